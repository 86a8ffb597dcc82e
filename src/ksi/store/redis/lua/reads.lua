-- get, history, session, lock, page, totals, routes, log, account: what changes nothing.
--
-- ARGV[2]  get: request_id; history: head max_chars; session: name; lock: name line_limit; log: after limit max_chars;
--          page: list index after backwards limit; account: after until limit
-- Answer   a map, and the bytes that belong to it

local function session_view(conv)
  return {
    conversation = conv.name,
    created_at = bare(conv.created),
    active_at = bare(conv.active),
    turns = conv.turns,
    head = bare(conv.head),
    provider = conv.provider,
    provider_session = conv.session,
    agents = call('ZRANGE', P .. 'ca:' .. conv.number, 0, -1),
    locked = conv.holder ~= nil,
    forked_from = conv.parent and conversation(conv.parent).name or nil,
    node = conv.node,
  }
end

local function line_entry(rec)
  return {
    request_id = rec.id,
    priority = tonumber(rec.priority),
    external = rec.external ~= nil,
    enqueued_at = bare(rec.enqueued),
  }
end

local function lock_view(conv, line_limit)
  local holder = holder_of(conv)
  local line = {}
  if line_limit > 0 then
    for _, entry in ipairs(call('ZRANGE', P .. 'l:' .. conv.number, 0, line_limit - 1)) do
      line[#line + 1] = line_entry(request(string.sub(entry, 21)))
    end
  end
  return {
    conversation = conv.name,
    holder = name_of(holder),
    external = holder and holder.external ~= nil or false,
    state = holder and (holder.state or 'running') or nil,
    since = bare(conv.since),
    expires_at = holder and holder.expires_at or nil,
    fence = holder and tonumber(holder.fence) or nil,
    metadata = holder and holder.metadata or nil,
    line = line,
    waiting = math.min(call('ZCARD', P .. 'l:' .. conv.number), R.position_limit),
    node = conv.node,
  }
end

local function row(rec)
  local map = fields_of(rec)
  map.failed_at = nil
  if rec.state == 'retrying' or rec.state == 'parked' then
    map.failed_at = rec.failed_at
  end
  return map
end

local SHOW = {
  session = function(member) return session_view(conversation(member)) end,
  lock = function(member) return lock_view(conversation(member), 0) end,
  chain = function(member) return chain_view(record('ch:' .. member)) end,
  injection = function(member) return injection_row(record('i:' .. member)) end,
  member = function(key)
    local rec = request(key)
    local link = link_of(rec)
    return {
      request_id = rec.id,
      parent = link.parent,
      depth = link.depth,
      conversation = conversation(rec.conversation).name,
      agent_id = rec.agent,
      state = rec.state,
      enqueued_at = bare(rec.enqueued),
      finished_at = bare(rec.finished),
      tokens = link.tokens,
      estimated = link.estimated,
      reason = link.block,
    }
  end,
  fork = function(member) return cmsgpack.unpack(call('GET', P .. 'f:' .. member)) end,
  row = function(member)
    local rec = request(string.sub(member, -16))
    return not rec.external and row(rec) or nil
  end,
}

-- Items of one ordered index behind `after`, until there is one more than asked for.
local function take(items, places, name, after, outer)
  local show, from = SHOW[A.show], after
  while #items <= A.limit do
    local members
    if A.backwards then
      members = call('ZREVRANGEBYLEX', P .. name, from and '(' .. from or '+', '-', 'LIMIT', 0, A.limit + 1)
    else
      members = call('ZRANGEBYLEX', P .. name, from and '(' .. from or '-', '+', 'LIMIT', 0, A.limit + 1)
    end
    if #members == 0 then
      return
    end
    for _, member in ipairs(members) do
      local item = show(member)
      if item and #items <= A.limit then
        items[#items + 1] = item
        places[#places + 1] = {outer or '', member}
      end
    end
    from = members[#members]
  end
end

-- `A.inner`: the list is made of the indexes of this prefix that `A.index` names, one after the other.
read('page', function()
  local items, places = {}, {}
  if A.of then
    local chain = chain_called(A.of)
    if not chain then
      return {items = items, places = places}
    end
    A.index = 'chm:' .. chain.number
  end
  if not A.inner then
    take(items, places, A.index, A.after)
    return {items = items, places = places}
  end
  local from = A.outer and '[' .. A.outer or '-'
  while #items <= A.limit do
    local names_there = call('ZRANGEBYLEX', P .. A.index, from, '+', 'LIMIT', 0, 100)
    if #names_there == 0 then
      break
    end
    for _, name in ipairs(names_there) do
      take(items, places, A.inner .. name, name == A.outer and A.after or nil, name)
      from = '(' .. name
      if #items > A.limit then
        break
      end
    end
  end
  return {items = items, places = places}
end)

read('get', function()
  local key = call('GET', P .. 'id:' .. A.request_id)
  local rec = key and request(key)
  if not rec or rec.external then
    return {}
  end
  local map, bytes = view(rec)
  return {view = map, unheard = not FINAL[rec.state] and not watched(rec)}, bytes
end)

-- As get, and this life will be told of the request's end.
verb('watch', function()
  local key = call('GET', P .. 'id:' .. A.request_id)
  local rec = key and request(key)
  if not rec or rec.external then
    return {}
  end
  if not FINAL[rec.state] then
    watch(rec)
  end
  local map, bytes = view(rec)
  return {existing = map}, bytes
end)

read('history', function()
  local bytes, size, turn = {}, 0, A.head
  while turn ~= NONE do
    local kept = call('GET', P .. 't:' .. turn)
    if not kept then
      break
    end
    size = size + tonumber(string.sub(kept, 49, 60))
    if #bytes > 0 and size > A.max_chars then
      break
    end
    bytes[#bytes + 1] = turn
    bytes[#bytes + 1] = kept
    bytes[#bytes + 1] = passages.body(string.sub(kept, 17, 32))
    bytes[#bytes + 1] = conversation(string.sub(kept, 33, 48)).name
    turn = string.sub(kept, 1, 16)
  end
  return {}, bytes
end)

read('session', function()
  local conv = find(A.name)
  return {view = conv and session_view(conv) or nil}
end)

read('lock', function()
  local conv = find(A.name)
  return {view = conv and lock_view(conv, A.line_limit) or nil}
end)

read('root', function()
  local conv = find(A.name)
  return {root = conv and conv.root or NONE}
end)

read('totals', function()
  local map = {
    locks = call('ZCARD', P .. 'held'),
    external_locks = call('ZCARD', P .. 'locks'),
    external_waiters = call('ZCARD', P .. 'waiters'),
    conversations = call('ZCARD', P .. 'sessions'),
  }
  count('running')
  for name, value in pairs(counts) do
    map[name] = map[name] or value
  end
  return map
end)

read('routes', function()
  local routes = {}
  for _, name in ipairs(call('ZRANGE', P .. 'routes', 0, -1)) do
    local route = string.match(name, '^(.*)\n') or name
    if not routes[#routes] or routes[#routes][1] ~= route then
      routes[#routes + 1] = {route, 0}
    end
    local last = routes[#routes]
    last[2] = math.min(last[2] + call('ZCARD', P .. 'ready:' .. name), R.position_limit)
  end
  return {routes = routes}
end)

read('log', function()
  local bytes, chars = {}, A.max_chars
  for _, turn in ipairs(call('ZRANGEBYLEX', P .. 'log:' .. R.daemon, '(' .. A.after, '+', 'LIMIT', 0, A.limit)) do
    if chars <= 0 then
      break
    end
    local kept = call('GET', P .. 't:' .. turn)
    chars = chars - tonumber(string.sub(kept, 61, 72))
    bytes[#bytes + 1] = turn
    bytes[#bytes + 1] = kept
    bytes[#bytes + 1] = request(string.sub(kept, 17, 32)).id
    bytes[#bytes + 1] = conversation(string.sub(kept, 33, 48)).name
  end
  return {}, bytes
end)

read('watermark', function()
  return {watermark = bare(call('HGET', P .. 'logged', R.daemon) or '0')}
end)

verb('set_watermark', function()
  call('HSET', P .. 'logged', R.daemon, A.watermark)
  return {}
end)

read('account', function()
  local found = call('ZRANGEBYLEX', P .. 'account', '(' .. A.after, '[' .. A['until'] .. ':', 'LIMIT', 0, A.limit)
  return {}, found
end)

read('bodies', function()
  local bytes = {}
  for _, key in ipairs(A.keys) do
    bytes[#bytes + 1] = passages.body(key)
  end
  return {}, bytes
end)

-- Whose turn is next: priority, tag, rank, flow and id of what stands first in each lane.
read('next_flows', function()
  local found = {}
  for _, name in ipairs(call('ZRANGE', P .. 'routes', 0, -1)) do
    for priority = 0, R.fair and 4 or -1 do
      local entries = call('ZRANGEBYLEX', P .. 'ready:' .. name, '[' .. priority, '(' .. priority + 1, 'LIMIT', 0, A.limit)
      for _, entry in ipairs(entries) do
        local rec = request(key_in(entry))
        if not string.find(name, '[\1\2]') then
          found[#found + 1] = {tonumber(rec.priority), tonumber(rec.tag or 0), rec.rank, rec.flow or '', rec.id}
        end
      end
    end
  end
  return {found = found}
end)
