-- Starting requests, and what one looks like from outside.

local function slot_of(offer)
  return offer[4] and (offer[2] .. '@' .. R.node) or offer[2]
end

-- How many more the offer's provider takes, counted from the rows.
local function room(offer)
  local slot = slot_of(offer)
  local free = offer[3] - size('slots:' .. slot)
  return offer[5] and math.min(free, terms.room(offer, slot)) or free
end

-- The first of a lane that may still be started.
local function first_in(name)
  local at = 0
  while true do
    local entry = at == 0 and first('ready:' .. name) or at > 0 and look('ZRANGE', 'ready:' .. name, at, at)[1]
    if not entry then
      return nil
    end
    local expires = request(string.sub(entry, 21)).expires
    if not expires or expires > A.wall then
      return entry
    end
    at = at + 1
  end
end

-- The first of a route that may still be started, and here (D4).
local function first_ready(route)
  local free = first_in(route)
  local own = count('bound') > 0 and first_in(lane(route, R.node)) or nil
  return own and (not free or own < free) and own or free
end

-- Give a request its conversation, fence, token, lease and slot. A new one that begins running is in no index yet.
local function run(rec, offer, token, grant)
  local conv = conversation(rec.conversation)
  local function take()
    rec.expires, rec.provider, rec.slot, rec.started = nil, offer[2], slot_of(offer), A.wall
    rec.token, rec.life = token, R.life
    set(rec, 'attempt', (tonumber(rec.attempt) or 0) + 1)
    rec.probe, rec.guess = nil, nil
    if offer[5] then
      terms.take(rec, offer)
    end
    hold(rec)
  end
  if rec.state == 'running' then
    take()
    index(rec, true)
  else
    become(rec, 'running', take)
  end
  local reminders = take_reminders(rec, conv)
  reindex(conv)
  return {
    key = bare(rec.key),
    request_id = rec.id,
    conversation = conv.name,
    route = rec.route,
    provider = offer[2],
    priority = tonumber(rec.priority),
    attempt = tonumber(rec.attempt),
    fence = tonumber(rec.fence),
    token = token,
    started_at = tonumber(A.wall),
    enqueued_at = tonumber(rec.enqueued),
    head = bare(conv.head),
    agent_id = rec.agent,
    requeued_from = rec.requeued_from,
    chain = begin_member(rec, grant),
    reminders = reminders,
  }
end

local TIMES = {'enqueued', 'due', 'expires', 'started', 'finished'}

local function fields_of(rec)
  local copy = {}
  for name, value in pairs(rec) do
    copy[name] = value
  end
  for _, name in ipairs(TIMES) do
    copy[name] = bare(copy[name])
  end
  copy.conversation = conversation(rec.conversation).name
  local link = link_of(rec)
  copy.chain = link and chain_of(rec).name or nil
  if link then
    copy.parent, copy.depth, copy.block, copy.injection = link.parent, link.depth, link.block, link.carries and rec.id
  end
  return copy
end

-- A request with all that is known of it: a map, and as bytes its body, its turn and its ended attempts.
local function view(rec)
  local conv = conversation(rec.conversation)
  local map = fields_of(rec)
  map.held = conv.holder == rec.key
  if rec.state == 'queued' and not map.held then
    map.position = before(conv, rec.rank, rec.key)
  end
  if conv.ready == place(rec) then
    map.node = conv.ready_node
  end
  if FINAL[rec.state] == nil and not map.held then
    map.holder = name_of(holder_of(conv))
  end
  local bytes = direct('LRANGE', P .. 'a:' .. rec.key, 0, -1)
  if rec.at_once then
    table.insert(bytes, 1, trail_entry('T', 1, ''))
  end
  table.insert(bytes, 1, rec.turn and text('t:' .. rec.turn) or '')
  table.insert(bytes, 1, text('b:' .. rec.key))
  return map, bytes
end

-- Whether this life hears of a request's end.
local function watched(rec)
  return string.find(' ' .. (rec.watchers or '') .. ' ', ' ' .. R.life .. ' ', 1, true) ~= nil
end

-- Note that this life wants to hear of a request's end (D1).
local function watch(rec)
  if not watched(rec) then
    set(rec, 'watchers', (rec.watchers or '') .. ' ' .. R.life)
  end
end

-- `finish` for a request without a run of its own, as `Ended` tells it.
local function ended(rec, state, err, message, block)
  local passing, injections = finish(rec, state, err, message, block)
  return {
    block = block,
    injections = injections,
    request_id = rec.id,
    conversation = conversation(rec.conversation).name,
    state = state,
    error = err,
    passing = passing,
  }
end

-- Tell the life that serves an external holder or waiter that it is over.
local function tell_gone(rec, held)
  local lapsed = {request_id = rec.id, conversation = conversation(rec.conversation).name, held = held}
  tell(rec.life, {kind = 'gone', name = rec.id, lapsed = lapsed})
end

local function lapse(rec)
  local held = holds(rec)
  local map = {request_id = rec.id, conversation = conversation(rec.conversation).name, held = held}
  tell_gone(rec, held)
  map.passing = take_away(rec)
  return map
end
