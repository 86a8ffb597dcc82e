-- stop_others, write, go_on: one life has the whole namespace for itself, to save it or to load it.
--
--   stop            STRING  the life that has it, for STOP ms after it was last heard of; all others are refused
--   meta.loading    the life that fills it: while it stands, what is here is a part
--
-- ARGV[2]  stop_others: loading; write: sizes of the commands that follow, their keys without the namespace; go_on: count (ARGV[3])
-- Answer   found: how much is here already, or the last fence

local STOP = 60000

verb('stop_others', function()
  for _, life in ipairs(call('ZRANGEBYSCORE', P .. 'lives', string.format('%.0f', time()), '+inf')) do
    if life ~= R.life then
      return {error = 'in_use'}
    end
  end
  if A.loading then
    local sessions = call('ZCARD', P .. 'sessions')
    if sessions > 0 then
      return {error = 'not_empty', found = sessions}
    end
    call('HSET', P .. 'meta', 'loading', R.life)
  end
  call('SET', P .. 'stop', R.life, 'PX', STOP)
  return {found = count('fence')}
end)

local function ours()
  return call('GET', P .. 'stop') == R.life
end

verb('write', function()
  if not ours() then
    return {error = 'lost'}
  end
  call('PEXPIRE', P .. 'stop', STOP)
  local at = 3
  for _, size in ipairs(A.sizes) do
    call(ARGS[at], P .. ARGS[at + 1], unpack(ARGS, at + 2, at + size - 1))
    at = at + size
  end
  return {}
end)

verb('go_on', function()
  if not ours() then
    return {error = 'lost'}
  end
  if ARGS[3] then
    call('SET', P .. 'count', ARGS[3])
  end
  call('HDEL', P .. 'meta', 'loading')
  call('DEL', P .. 'stop')
  woke = true
  return {}
end)
