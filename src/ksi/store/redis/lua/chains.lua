-- deliver, redeliver, close_chain, reset_chain, and the reads of chains and deliveries.
--
-- ARGV[2]  deliver: request_id aftermath; redeliver: injection_id again; close_chain, reset_chain, chain: name limit;
--          trail: request_id limit; injection: injection_id; unrouted: limit; then the bytes of follow-ups
-- Answer   {injections}, {chain, unfinished}, {view}, {view, hops}

local function member(id)
  local key = call('GET', P .. 'id:' .. id)
  local rec = key and request(key)
  return rec and rec.chain and rec or nil
end

verb('deliver', function()
  local rec = member(A.request_id)
  local link = rec and link_of(rec)
  if not link or link.routing ~= 2 then
    return {injections = {}}
  end
  set_routing(rec, link, 3)
  return {injections = write_aftermath(rec, A.aftermath)}
end)

verb('redeliver', function()
  local number = call('GET', P .. 'inj:' .. A.injection_id)
  local old = number and record('i:' .. number)
  if not old then
    return {error = 'unknown'}
  end
  if old.state ~= 'blocked' and old.state ~= 'failed' then
    return {error = 'alive', state = old.state}
  end
  local parent = request(old.parent_key)
  if not parent or not parent.chain then
    return {error = 'no_parent', parent = old.parent}
  end
  move_injection(old, 'retried')
  local row = injection_row(old)
  return {injections = {row, send(parent, A.again)}}
end)

verb('close_chain', function()
  local chain = chain_called(A.name)
  if not chain then
    return {error = 'unknown'}
  end
  put(chain, 'closed', true)
  local unfinished, at = {}, 0
  while #unfinished < A.limit do
    local keys = call('ZRANGE', P .. 'cho:' .. chain.number, at, at + A.limit - 1)
    if #keys == 0 then
      break
    end
    at = at + #keys
    for _, key in ipairs(keys) do
      local rec = request(key)
      if not rec.cancelling and #unfinished < A.limit then
        unfinished[#unfinished + 1] = rec.id
      end
    end
  end
  return {chain = chain.name, unfinished = unfinished}
end)

verb('reset_chain', function()
  local chain, link = chain_called(A.name)
  if not chain then
    return {error = 'unknown'}
  end
  put(chain, 'started', tonumber(A.wall))
  put(chain, 'used', 0)
  put(chain, 'estimated', 0)
  put(chain, 'closed', nil)
  put(chain, 'tripped', nil)
  put(chain, 'guards', 0)
  more_of(chain, 'resets', 1)
  put(chain, 'reset_key', key16(count('member')))
  return {view = chain_view(chain, link)}
end)

read('chain', function()
  local chain, link = chain_called(A.name)
  return {view = chain and chain_view(chain, link) or nil}
end)

read('trail', function()
  local rec = member(A.request_id)
  if not rec then
    return {}
  end
  local chain, hops, bytes = chain_of(rec), {}, {}
  local view = chain_view(chain, link_of(rec))
  while rec and rec.chain and #hops < A.limit and rec.key > chain.reset_key do
    local link = link_of(rec)
    hops[#hops + 1] = {
      request_id = rec.id,
      depth = link.depth,
      conversation = conversation(rec.conversation).name,
      agent_id = rec.agent,
      state = rec.state,
      error = rec.error,
    }
    local marks = call('HMGET', P .. 'm:' .. rec.key, 'mark', 'result')
    bytes[#bytes + 1], bytes[#bytes + 2] = marks[1], marks[2]
    rec = link.parent_key and request(link.parent_key)
  end
  return {view = view, hops = hops}, bytes
end)

read('injection', function()
  local number = call('GET', P .. 'inj:' .. A.injection_id)
  local inj = number and record('i:' .. number)
  if not inj then
    return {}
  end
  local map = injection_row(inj)
  map.text = passages.delivery(number)
  local dead = inj.state == 'blocked' or inj.state == 'failed'
  local child = dead and text('ic:' .. number) or ''
  return {view = map}, {child, passages.of_child(child)}
end)

read('unrouted', function()
  local ids = {}
  for _, key in ipairs(call('ZRANGE', P .. 'unrouted', 0, A.limit - 1)) do
    ids[#ids + 1] = request(key).id
  end
  return {ids = ids}
end)

read('chain_keys', function()
  local number = call('GET', P .. 'chain:' .. A.name)
  return {}, number and call('ZRANGE', P .. 'chm:' .. number, 0, -1) or {}
end)
