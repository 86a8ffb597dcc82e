-- What a request's end sends to other conversations (C3): children into lines, reminders before prompts, dead letters.
--
-- A follow-up: injection_id target trigger text block guard; child (route rank model priority agent error membership) with
-- the place in ARGV of its body, itself as bytes, and its mark.

-- The body, the request itself and the mark of a child.
local function blobs_of(child)
  local mark = ARGS[child.blobs + 2]
  return ARGS[child.blobs], ARGS[child.blobs + 1], mark ~= '' and mark or nil
end

local function free_id(follow_up)
  local name = follow_up.injection_id
  while text('inj:' .. name) or (follow_up.child and text('id:' .. name)) do
    name = name .. '+'
  end
  return name
end

local function record_injection(parent, chain, follow_up)
  local known = find(follow_up.target)
  local number = key16(next_number('injection'))
  local inj = new_record('i:' .. number)
  inj.number, inj.id, inj.chain, inj.parent, inj.parent_key = number, free_id(follow_up), chain.name, parent.id, parent.key
  inj.target, inj.trigger = known and known.name or follow_up.target, follow_up.trigger
  inj.created, inj.direct, inj.state = tonumber(A.wall), follow_up.child ~= nil, 'queued'
  dirty[inj] = true
  put_text('inj:' .. inj.id, number)
  put_text('ix:' .. number, follow_up.text)
  if follow_up.child then
    local _, packed = blobs_of(follow_up.child)
    put_text('ic:' .. number, packed)
  end
  add('injections', number)
  add('injections:queued', number)
  return inj
end

-- Why a follow-up cannot even be sent: a state and a reason; nothing where it can.
local function fate(chain, link, follow_up, guard)
  local membership = follow_up.child and follow_up.child.membership
  local block = follow_up.block or (membership and membership.block)
  if not block and follow_up.child and follow_up.child.error then
    return 'failed', {code = 'invalid_request', message = follow_up.child.error}
  end
  local limits = within(link.limits, membership and membership.limits or link.limits)
  block = may_enter(chain, limits, link.depth + 1, block, guard, membership and membership.estimate or 0)
  if block then
    return 'blocked', block
  end
end

local function remind(inj, chain, guard)
  local conv = conversation_named(inj.target)
  add('rm:' .. conv.number, inj.number)
  put(conv, 'reminding', true)
  set(conv, 'active', A.wall)
  more_of(chain, 'guards', guard and 1 or 0)
  refresh(conv)
end

local function add_agent(conv, agent)
  if conv.agent == agent then
    return
  end
  local agents = 'ca:' .. conv.number
  if not look('ZSCORE', agents, agent) then
    direct('ZADD', P .. agents, look('ZCARD', agents), agent)
  end
  add('as:' .. agent, conv.number)
  set(conv, 'agent', agent)
end

-- A request's record, under its id and with its body; in no index yet.
local function make_request(conv, state, fields, body)
  local key = key16(next_number('member'))
  local rec = new_record('r:' .. key, {
    key = key,
    id = fields.request_id,
    conversation = conv.number,
    state = state,
    rank = fields.rank,
    priority = string.format('%.0f', fields.priority),
    enqueued = A.wall,
    route = fields.route,
    model = fields.model,
    agent = fields.agent,
    hold = fields.hold == false and '0' or '1',
    -- What follows soon: the table has room for it from the beginning.
    watchers = nil, provider = nil, slot = nil, started = nil, attempt = nil, token = nil, life = nil, fence = nil,
  })
  dirty[rec] = true
  set(conv, 'members', tonumber(conv.members) + 1)
  put_text('id:' .. fields.request_id, key)
  put_text('b:' .. key, body)
  set_count(state, count(state) + 1)
  return rec
end

local function send_child(inj, parent, chain, link, child, guard)
  local conv = conversation_named(inj.target)
  if child.agent then
    add_agent(conv, child.agent)
  end
  set(conv, 'active', A.wall)
  note_route(child.route)
  local body, _, mark = blobs_of(child)
  child.request_id = inj.id
  local rec = make_request(conv, 'queued', child, body)
  local membership = child.membership
  membership.guard = guard
  local own = add_member(rec, chain, membership, within(membership.limits, link.limits), link.depth + 1, parent, nil, mark)
  put(own, 'carries', inj.number)
  put(inj, 'request_id', rec.id)
  index(rec, true)
  refresh(conv)
end

local function send(parent, follow_up)
  local chain, link = chain_of(parent), link_of(parent)
  local membership = follow_up.child and follow_up.child.membership
  if membership and membership.trips and membership.block then
    trip(chain, membership.block)
  end
  local guard = follow_up.guard or (membership and membership.guard) or false
  local state, reason = fate(chain, link, follow_up, guard)
  local inj = record_injection(parent, chain, follow_up)
  if state then
    bury(inj, state, reason)
  elseif follow_up.child then
    send_child(inj, parent, chain, link, follow_up.child, guard)
  else
    remind(inj, chain, guard)
  end
  return injection_row(inj)
end

-- A request's aftermath, in the step of its end or behind it: `aftermath` has trip, follow_ups, and the mark's place.
local function write_aftermath(rec, aftermath)
  local sent = {}
  if aftermath.mark then
    direct('HSET', P .. 'm:' .. rec.key, 'result', ARGS[aftermath.mark])
  end
  if aftermath.trip then
    trip(chain_of(rec), aftermath.trip)
  end
  for _, follow_up in ipairs(aftermath.follow_ups) do
    sent[#sent + 1] = send(rec, follow_up)
  end
  return sent
end
