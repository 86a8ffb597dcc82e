-- What a request's end sends to other conversations: children into lines, reminders before prompts, dead letters.
--
-- A follow-up: injection_id target trigger block guard; `text`, the place of its text in ARGV; child (route rank model
-- priority agent error membership) with the place in ARGV of its body, itself as bytes, and its mark. `cut` of both is where
-- the passage was cut out.

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

local function record_injection(parent, chain, follow_up, passage)
  local known = find(follow_up.target)
  local number = key16(next_number('injection'))
  local inj = new_record('i:' .. number)
  inj.number, inj.id, inj.chain, inj.parent, inj.parent_key = number, free_id(follow_up), chain.name, parent.id, parent.key
  inj.target, inj.trigger = known and known.name or follow_up.target, follow_up.trigger
  inj.created, inj.direct, inj.state = tonumber(A.wall), follow_up.child ~= nil, 'queued'
  dirty[inj] = true
  put_text('inj:' .. inj.id, number)
  passages.keep('ix:' .. number, ARGS[follow_up.text], follow_up.cut, passage)
  if follow_up.child then
    local _, packed = blobs_of(follow_up.child)
    passages.keep('ic:' .. number, packed, follow_up.child.cut, passage)
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

-- A request's record, under its id and with its body, out of which a passage may be cut; in no index yet.
local function make_request(conv, state, fields, body, cut, passage)
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
    demand = fields.demand and cmsgpack.pack(fields.demand) or nil,
    hold = fields.hold == false and '0' or '1',
    -- What follows soon: the table has room for it from the beginning.
    watchers = nil, provider = nil, slot = nil, started = nil, attempt = nil, token = nil, life = nil, fence = nil,
  })
  dirty[rec] = true
  if R.fair and (state == 'queued' or state == 'scheduled') then
    set(rec, 'flow', rec.agent and 'agent:' .. rec.agent or fields.flow or 'session:' .. conv.name)
    if state == 'queued' then
      turns.take(rec)
    end
  end
  set(conv, 'members', tonumber(conv.members) + 1)
  put_text('id:' .. fields.request_id, key)
  passages.keep('b:' .. key, body, cut, passage)
  set_count(state, count(state) + 1)
  return rec
end

-- Let a request that is in no index yet ask a person.
local function ask(rec, question, text)
  set(rec, 'question', question)
  set(rec, 'message', text)
  set(rec, 'asks', '1')
end

local function send_child(inj, parent, chain, link, child, guard, passage)
  local conv = conversation_named(inj.target)
  if child.agent then
    add_agent(conv, child.agent)
  end
  set(conv, 'active', A.wall)
  note_route(child.route)
  local body, _, mark = blobs_of(child)
  child.request_id = inj.id
  local rec = make_request(conv, child.question and 'scheduled' or 'queued', child, body, child.cut, passage)
  if child.question then
    ask(rec, child.question, child.text)
    set(rec, 'expires', child.expires)
  end
  local membership = child.membership
  membership.guard = guard
  local own = add_member(rec, chain, membership, within(membership.limits, link.limits), link.depth + 1, parent, nil, mark)
  put(own, 'carries', inj.number)
  put(inj, 'request_id', rec.id)
  index(rec, true)
  refresh(conv)
end

local function send(parent, follow_up, passage)
  local chain, link = chain_of(parent), link_of(parent)
  local membership = follow_up.child and follow_up.child.membership
  if membership and membership.trips and membership.block then
    trip(chain, membership.block)
  end
  local guard = follow_up.guard or (membership and membership.guard) or false
  local state, reason = fate(chain, link, follow_up, guard)
  local inj = record_injection(parent, chain, follow_up, passage)
  if state then
    bury(inj, state, reason)
  elseif follow_up.child then
    send_child(inj, parent, chain, link, follow_up.child, guard, passage)
  else
    remind(inj, chain, guard)
  end
  return injection_row(inj)
end

-- A request's aftermath, in the step of its end or behind it: `aftermath` has trip, follow_ups, and the places of the mark
-- and of the passage, which is followed by itself as it stands within JSON.
local function write_aftermath(rec, aftermath)
  local sent = {}
  if aftermath.mark then
    direct('HSET', P .. 'm:' .. rec.key, 'result', ARGS[aftermath.mark])
  end
  if aftermath.trip then
    trip(chain_of(rec), aftermath.trip)
  end
  local passage = {at = aftermath.passage}
  for _, follow_up in ipairs(aftermath.follow_ups) do
    sent[#sent + 1] = send(rec, follow_up, passage)
  end
  return sent
end
