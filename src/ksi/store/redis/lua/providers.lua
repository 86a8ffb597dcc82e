-- provider_records, put_provider_record: what the daemons know of their providers together.
--
--   providers       HASH    by provider: a version in 16 digits and a record, into which Lua does not look
--
-- ARGV[2]  put: name, version, tell     ARGV[3]  the record
-- Answer   at: the time by which records are dated; names and versions, and the records; or written, version, and the
--          record that was in the way

read('provider_records', function()
  local map, bytes = {at = time(), names = {}, versions = {}}, {}
  local found = call('HGETALL', P .. 'providers')
  for at = 1, #found, 2 do
    table.insert(map.names, found[at])
    table.insert(map.versions, tonumber(string.sub(found[at + 1], 1, 16)))
    table.insert(bytes, string.sub(found[at + 1], 17))
  end
  return map, bytes
end)

verb('put_provider_record', function()
  local kept = call('HGET', P .. 'providers', A.name)
  local version = kept and tonumber(string.sub(kept, 1, 16)) or 0
  if version ~= A.version then
    return {at = time(), written = false, version = version}, {kept and string.sub(kept, 17) or ''}
  end
  call('HSET', P .. 'providers', A.name, key16(version + 1) .. ARGS[3])
  if A.tell then
    for _, life in ipairs(call('ZRANGE', P .. 'lives', 0, -1)) do
      tell(life, {kind = 'provider', name = A.name})
    end
  end
  return {at = time(), written = true, version = version + 1}
end)
