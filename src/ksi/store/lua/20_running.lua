-- Starting requests, and what one looks like from outside.

-- Whether this life may still be given work; one that was declared dead begins a new life first (D2).
local function alive()
  return call('ZSCORE', P .. 'lives', R.life)
end

local function slot_of(offer)
  return offer[4] and (offer[2] .. '@' .. R.node) or offer[2]
end

-- How many more the offer's provider takes, counted from the rows.
local function room(offer)
  return offer[3] - call('SCARD', P .. 'slots:' .. slot_of(offer))
end

-- The first of a route that may still be started; `skip` are keys that are spoken for already.
local function first_ready(route)
  local at = 0
  while true do
    local entry = call('ZRANGE', P .. 'ready:' .. route, at, at)[1]
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

-- Give a request its conversation, fence, token, lease and slot. A new one that begins running is in no index yet.
local function run(rec, offer, token, grant)
  local conv = conversation(rec.conversation)
  local function take()
    set(rec, 'expires', nil)
    set(rec, 'provider', offer[2])
    set(rec, 'slot', slot_of(offer))
    set(rec, 'started', A.wall)
    set(rec, 'attempt', (tonumber(rec.attempt) or 0) + 1)
    set(rec, 'token', token)
    set(rec, 'life', R.life)
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
  if FINAL[rec.state] == nil and not map.held then
    map.holder = name_of(holder_of(conv))
  end
  local bytes = call('LRANGE', P .. 'a:' .. rec.key, 0, -1)
  if rec.at_once then
    table.insert(bytes, 1, trail_entry('T', 1, ''))
  end
  table.insert(bytes, 1, rec.turn and call('GET', P .. 't:' .. rec.turn) or '')
  table.insert(bytes, 1, call('GET', P .. 'b:' .. rec.key))
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
