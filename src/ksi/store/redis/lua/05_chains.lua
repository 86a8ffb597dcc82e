-- Chains: who comes in, what runs and costs; and the deliveries that a request carries or takes along.
-- The rules are those of `ksi.store.chains` and `ksi.store.admission`, word for word.
--
--   chain:<name>    STRING  number of a chain;        chains  ZSET  all, by number
--   ch:<number>     packed  a chain's figures;        chm: cho:  ZSETs  its members, and those that are not final
--   k:<key>         packed  how a request belongs to its chain;   m:<key>  HASH  mark and result, for pattern checks
--   unrouted        ZSET    ended members whose aftermath is not written
--   inj:<id>        STRING  number of a delivery;     i:<number>  packed  a delivery
--   ix: ic:         STRING  its text, and the child request of a dead letter; what they may have cut out: see `passages`
--   p:<number>      packed  how many refer to a passage;  pt: pd:  STRING  the passage, and as it stands within JSON
--   injections injections:<state> injections_ended    ZSETs
--   rm:<conversation> ZSET  reminders that wait for its next prompt

local function put(rec, field, value)
  rec[field] = value
  dirty[rec] = true
end

local function more_of(rec, field, by)
  put(rec, field, (rec[field] or 0) + by)
end

-- -- passages ---------------------------------------------------------------------------------------------------------
--
-- A long text that several deliveries and bodies have in common is kept once, as long as any of them is. In the value from
-- which it was cut stand a zero byte, its number in 16 digits, the place in 12, and what is left.

local passages = {}

local HEAD = 29

-- The number and the place in the beginning of a value; nothing where it is whole.
local function cut_out(value)
  if value and string.byte(value, 1) == 0 then
    local number, place = string.match(value, '^%z(%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d%d)(%d%d%d%d%d%d%d%d%d%d%d%d)')
    return number, tonumber(place)
  end
end

local function whole(value, kind)
  local number, place = cut_out(value)
  if not number then
    return value
  end
  local passage = number == NONE and '' or text(kind .. number)
  return string.sub(value, HEAD + 1, HEAD + place) .. passage .. string.sub(value, HEAD + place + 1)
end

-- A request's body, whole.
function passages.body(key)
  return whole(text('b:' .. key), 'pd:')
end

-- A delivery's text, whole.
function passages.delivery(number)
  return whole(text('ix:' .. number), 'pt:')
end

-- What was cut out of a delivery's request, as it stands within JSON; empty where it is whole.
function passages.of_child(packed)
  local number = cut_out(packed)
  return number and text('pd:' .. number) or ''
end

local function refer(passage)
  if not passage.number then
    passage.number = key16(next_number('passage'))
    passage.rec = new_record('p:' .. passage.number, {refs = 0})
    put_text('pt:' .. passage.number, ARGS[passage.at])
    put_text('pd:' .. passage.number, ARGS[passage.at + 1])
  end
  more_of(passage.rec, 'refs', 1)
  return passage.number
end

-- Keep a value. With a place, that is where `passage` was cut out of it: {at}, its place in ARGV.
function passages.keep(name, value, place, passage)
  if place then
    value = '\0' .. refer(passage) .. string.format('%012.0f', place) .. value
  elseif string.byte(value, 1) == 0 then
    value = '\0' .. NONE .. string.rep('0', 12) .. value
  end
  put_text(name, value)
end

-- Delete what `keep` kept; a passage goes with the last that refers to it.
function passages.drop(name)
  local number = cut_out(texts[name] or direct('GETRANGE', P .. name, 0, HEAD - 1))
  drop(name)
  if number and number ~= NONE then
    local rec = record('p:' .. number)
    more_of(rec, 'refs', -1)
    if rec.refs == 0 then
      drop('pt:' .. number, 'pd:' .. number)
      forget_record(rec)
    end
  end
end

-- -- rules ------------------------------------------------------------------------------------------------------------

local function number_text(number)
  return string.format('%.0f', number)
end

local function spent_block(chain, limits, estimate)
  local message = number_text(chain.used) .. ' tokens used and ' .. number_text(chain.reserved)
  message = message .. " set aside of the chain's " .. number_text(limits.token_budget)
  if estimate > 0 then
    message = message .. "; this request's input is about " .. number_text(estimate)
  end
  return {code = 'token_budget', message = message}
end

-- Whether a member with so many tokens of input may come in; nothing where it may.
local function check(chain, limits, depth, estimate)
  local wall = tonumber(A.wall)
  if chain.closed then
    return {code = 'chain_closed', message = 'the chain was cancelled and takes no new requests'}
  end
  if chain.tripped then
    return chain.tripped
  end
  if depth > limits.max_depth then
    local message = 'depth ' .. depth .. " is over the chain's max_depth " .. number_text(limits.max_depth)
    return {code = 'max_depth', message = message}
  end
  if wall - chain.started > limits.time_window then
    local age = math.floor((wall - chain.started) / 1000000)
    local window = math.floor(limits.time_window / 1000000)
    local message = 'the chain is ' .. number_text(age) .. ' s old, over its time_window of ' .. number_text(window)
    return {code = 'time_window', message = message .. ' s'}
  end
  if chain.used + math.max(chain.reserved, estimate) >= limits.token_budget then
    return spent_block(chain, limits, estimate)
  end
end

local function may_enter(chain, limits, depth, block, guard, estimate)
  if block then
    return block
  end
  if not guard then
    return check(chain, limits, depth, estimate)
  end
  if chain.guards >= R.guard_messages then
    return {code = 'guard_cap', message = 'the chain sent its ' .. R.guard_messages .. ' guard messages'}
  end
end

-- Whether a member may run now: a block, or what is set aside for it, or neither.
local function may_run(chain, limits, depth, estimate, output_cap, guard)
  if guard then
    return nil
  end
  local block = check(chain, limits, depth, output_cap and estimate or 0)
  if block or not output_cap then
    return block
  end
  local left = limits.token_budget - chain.used - chain.reserved - estimate
  if left < 1 then
    return spent_block(chain, limits, estimate)
  end
  local cap = math.min(output_cap, left)
  return nil, {output_cap = cap, reserved = estimate + cap}
end

local function within(limits, other)
  return {
    max_depth = math.min(limits.max_depth, other.max_depth),
    token_budget = math.min(limits.token_budget, other.token_budget),
    time_window = math.min(limits.time_window, other.time_window),
  }
end

-- -- chains and links -------------------------------------------------------------------------------------------------

local function link_of(rec)
  return rec.chain and record('k:' .. rec.key) or nil
end

local function chain_of(rec)
  return rec.chain and record('ch:' .. rec.chain) or nil
end

local function link_may_run(rec)
  local link = link_of(rec)
  if link then
    return may_run(chain_of(rec), link.limits, link.depth, link.estimate, link.output_cap, link.guard)
  end
end

local function trip(chain, block)
  put(chain, 'tripped', chain.tripped or block)
end

local function set_routing(rec, link, routing)
  if link.routing == 2 then
    remove('unrouted', rec.key)
  end
  if routing == 2 then
    add('unrouted', rec.key)
  end
  put(link, 'routing', routing)
end

local function routing_ended(rec, link, routed)
  if link.routing == 1 then
    set_routing(rec, link, routed and 3 or 2)
  end
end

local function new_chain(name, limits, created, started)
  local number = key16(next_number('chain'))
  local chain = new_record('ch:' .. number)
  chain.number, chain.name, chain.limits, chain.created, chain.started = number, name, limits, created, started
  chain.used, chain.estimated, chain.reserved, chain.guards, chain.resets, chain.deepest = 0, 0, 0, 0, 0, 0
  chain.reset_key = NONE
  dirty[chain] = true
  put_text('chain:' .. name, number)
  add('chains', number)
  return chain
end

-- Write how a request belongs to its chain. `membership`: injects estimate output_cap guard; `mark`: bytes or nothing.
local function add_member(rec, chain, membership, limits, depth, parent, block, mark)
  local link = new_record('k:' .. rec.key)
  set(rec, 'chain', chain.number)
  link.parent, link.parent_key = parent and parent.id or nil, parent and parent.key or nil
  link.depth, link.limits, link.block = depth, limits, block
  link.estimate, link.output_cap, link.guard = membership.estimate, membership.output_cap, membership.guard
  link.routing, link.reserved, link.tokens, link.estimated = 0, 0, 0, false
  dirty[link] = true
  if membership.injects then
    set_routing(rec, link, 1)
  end
  if mark then
    direct('HSET', P .. 'm:' .. rec.key, 'mark', mark)
  end
  add('chm:' .. chain.number, rec.key)
  if link.guard then
    more_of(chain, 'notices', 1)
  else
    put(chain, 'deepest', math.max(chain.deepest, depth))
  end
  if block then
    routing_ended(rec, link, false)
  else
    add('cho:' .. chain.number, rec.key)
    more_of(chain, 'guards', membership.guard and 1 or 0)
  end
  return link
end

-- Give back what was set aside for an ended attempt, and charge what it used; `tokens` nil: it has no report.
local function charge(rec, tokens, text_tokens)
  local link = link_of(rec)
  if not link then
    set(rec, 'spent', (tonumber(rec.spent) or 0) + (tokens or text_tokens))
    set(rec, 'guessed', (tonumber(rec.guessed) or 0) + (tokens and 0 or text_tokens))
    return
  end
  local chain = chain_of(rec)
  local cost = tokens or link.estimate + text_tokens
  more_of(chain, 'reserved', -link.reserved)
  put(link, 'reserved', 0)
  more_of(link, 'tokens', cost)
  more_of(chain, 'used', cost)
  if not tokens then
    put(link, 'estimated', true)
    more_of(chain, 'estimated', cost)
  end
end

-- Set aside what a run was granted; what it knows of its chain.
local function begin_member(rec, grant)
  local link = link_of(rec)
  if not link then
    return nil
  end
  local chain = chain_of(rec)
  if grant then
    put(link, 'reserved', grant.reserved)
    more_of(chain, 'reserved', grant.reserved)
  end
  return {
    chain = chain.name,
    depth = link.depth,
    parent = link.parent,
    output_cap = grant and grant.output_cap or nil,
    injects = link.routing ~= 0,
  }
end

local function chain_view(chain, link)
  return {
    chain = chain.name,
    created_at = chain.created,
    limits = link and link.limits or chain.limits,
    spending = {
      started_at = chain.started,
      used = chain.used,
      reserved = chain.reserved,
      closed = chain.closed or false,
      tripped = chain.tripped,
    },
    members = look('ZCARD', 'chm:' .. chain.number) - (chain.notices or 0),
    depth = link and link.depth or chain.deepest,
    estimated = chain.estimated,
    unfinished = look('ZCARD', 'cho:' .. chain.number),
    guard_messages = chain.guards,
    resets = chain.resets,
  }
end

-- A chain by its id, or by any member's, with that member's link.
local function chain_called(name)
  local number = text('chain:' .. name)
  if number then
    return record('ch:' .. number)
  end
  local key = text('id:' .. name)
  local rec = key and request(key)
  if rec and rec.chain then
    return chain_of(rec), link_of(rec)
  end
end

-- -- deliveries -------------------------------------------------------------------------------------------------------

local function injection_row(inj)
  return {
    injection_id = inj.id,
    chain = inj.chain,
    parent = inj.parent,
    target = inj.target,
    mode = inj.direct and 'direct' or 'next',
    trigger = inj.trigger,
    state = inj.state,
    created_at = inj.created,
    finished_at = inj.finished,
    request_id = inj.request_id,
    reason = inj.reason,
  }
end

-- Bring a delivery into another state, at its end with the time of it.
local function move_injection(inj, state, finished)
  remove('injections:' .. inj.state, inj.number)
  add('injections:' .. state, inj.number)
  put(inj, 'state', state)
  if finished then
    put(inj, 'finished', tonumber(A.wall))
    add('injections_ended', A.wall .. inj.number)
  end
end

local function delivered(inj)
  move_injection(inj, 'delivered', true)
  passages.drop('ic:' .. inj.number)
end

local function bury(inj, state, reason)
  put(inj, 'reason', reason)
  move_injection(inj, state, true)
end

-- What became of the delivery that an ended request carried.
local function carried(rec)
  local link = link_of(rec)
  if not link or not link.carries then
    return nil
  end
  local inj = record('i:' .. link.carries)
  if rec.state == 'completed' then
    delivered(inj)
  elseif link.block then
    bury(inj, 'blocked', link.block)
  else
    local message = rec.message or "request '" .. rec.id .. "' ended " .. rec.state
    bury(inj, 'failed', {code = rec.error or rec.state, message = message})
  end
  return {injection_row(inj)}
end

-- A member ends now.
local function leave(rec, block, routed)
  local link = link_of(rec)
  if link then
    routing_ended(rec, link, routed)
    put(link, 'block', block)
    remove('cho:' .. rec.chain, rec.key)
  end
end

-- -- reminders --------------------------------------------------------------------------------------------------------

-- Give a run what waits for its conversation's next prompt.
local function take_reminders(rec, conv)
  if not conv.reminding then
    return nil
  end
  local taken, reminders = look('ZRANGE', 'rm:' .. conv.number, 0, -1), {}
  for _, number in ipairs(taken) do
    local inj = record('i:' .. number)
    move_injection(inj, 'taken')
    put(inj, 'request_id', rec.id)
    reminders[#reminders + 1] = {injection_id = inj.id, text = passages.delivery(number)}
  end
  call('DEL', P .. 'rm:' .. conv.number)
  put(conv, 'reminding', nil)
  put(rec, 'taken', taken)
  return reminders
end

local function put_reminders_back(rec, conv)
  for _, number in ipairs(rec.taken or {}) do
    local inj = record('i:' .. number)
    move_injection(inj, 'queued')
    put(inj, 'request_id', nil)
    add('rm:' .. conv.number, number)
    put(conv, 'reminding', true)
  end
  put(rec, 'taken', nil)
end

local function use_reminders(rec)
  local used = {}
  for _, number in ipairs(rec.taken or {}) do
    local inj = record('i:' .. number)
    delivered(inj)
    used[#used + 1] = injection_row(inj)
  end
  put(rec, 'taken', nil)
  return used
end
