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

-- The first of a lane that may still be started: of one priority, where it is given.
local function first_in(name, priority)
  local at = 0
  while true do
    local entry
    if priority then
      entry = look('ZRANGEBYLEX', 'ready:' .. name, '[' .. priority, '(' .. priority + 1, 'LIMIT', at, 1)[1]
    else
      entry = at == 0 and first('ready:' .. name) or at > 0 and look('ZRANGE', 'ready:' .. name, at, at)[1]
    end
    if not entry then
      return nil
    end
    local expires = request(key_in(entry)).expires
    if not expires or expires > A.wall then
      return entry
    end
    at = at + 1
  end
end

-- Put a lane's next requests, by priority, among those of others.
local function join_heads(heads, name)
  local head = first('ready:' .. name)
  if not head then
    return
  end
  local from, to = 0, 0
  if R.fair then
    from, to = tonumber(string.sub(head, 1, 1)), 4
  end
  for priority = from, to do
    local entry = first_in(name, R.fair and priority or nil)
    if entry and (not heads[priority] or entry < heads[priority]) then
      heads[priority] = entry
    end
  end
end

-- What comes next of a route and may be started here, by priority; without fairness all is one.
local function heads_of(route)
  local heads = {}
  join_heads(heads, route)
  if count('bound') > 0 then
    join_heads(heads, lane(route, R.node))
  end
  return heads
end

-- Give a request its conversation, fence, token, lease and slot. A new one that begins running is in no index yet.
local function run(rec, offer, token, grant, reserved)
  local conv = conversation(rec.conversation)
  local function take()
    rec.expires, rec.provider, rec.slot, rec.started = nil, offer[2], slot_of(offer), A.wall
    rec.token, rec.life = token, R.life
    set(rec, 'attempt', (tonumber(rec.attempt) or 0) + 1)
    rec.probe, rec.guess = nil, nil
    turns.started(rec)
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
  if reserved then
    budgets.begin(rec, reserved)
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
    output_cap = reserved and reserved[7] or nil,
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
  copy.demand, copy.reserved, copy.late = nil, nil, nil
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
    map.node = is_machine(conv.ready_node) and conv.ready_node or nil
    map.budget = conv.over_line
  end
  if FINAL[rec.state] == nil and not map.held then
    map.holder = name_of(holder_of(conv))
  end
  local bytes = direct('LRANGE', P .. 'a:' .. rec.key, 0, -1)
  if rec.at_once then
    table.insert(bytes, 1, trail_entry('T', 1, ''))
  end
  table.insert(bytes, 1, rec.turn and text('t:' .. rec.turn) or '')
  table.insert(bytes, 1, passages.body(rec.key))
  return map, bytes
end

-- Whether this life hears of a request's end.
local function watched(rec)
  return string.find(' ' .. (rec.watchers or '') .. ' ', ' ' .. R.life .. ' ', 1, true) ~= nil
end

-- Note that this life wants to hear of a request's end.
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
