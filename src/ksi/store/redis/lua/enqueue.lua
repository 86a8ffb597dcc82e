-- enqueue: a request into the queue, or straight into running.
--
-- ARGV[2]  request_id conversation route rank priority model agent due expires on_busy hold fork_of requeued_from;
--          caps and demand: see 12_budgets.lua; offers {{route, provider, limit, by_node, terms}}, token; chain: parent limits injects estimate output_cap block trips
--          guard marked
-- ARGV[3]  the body     ARGV[4]  the prompt's mark
-- Answer   the fields of `Enqueued`, `claim` without the body; or `existing`, a view with its bytes

-- What is known under the id already, or why the id cannot be taken.
local function kept()
  local key = text('id:' .. A.request_id)
  if not key then
    return nil
  end
  local rec = request(key)
  if rec.external then
    return {error = 'lock_id'}
  end
  if passages.body(key) ~= ARGS[3] then
    return {error = 'other_content'}
  end
  if not FINAL[rec.state] then
    watch(rec)
  end
  local map, bytes = view(rec)
  return {existing = map}, bytes
end

local function busy(conv, holder)
  return {
    error = 'conversation_busy',
    conversation_id = conv.name,
    holder = name_of(holder),
    since = bare(conv.since),
    position = before(conv, A.rank),
  }
end

-- The offer by which it can run at once: a free slot, and nobody ready before it for the same provider.
local function free_offer()
  if A.expires and A.expires <= A.wall then
    return nil
  end
  for _, offer in ipairs(A.offers) do
    if offer[1] == A.route and room(offer) > 0 then
      local free = true
      for _, other in ipairs(A.offers) do
        if other[2] == offer[2] then
          for _, entry in pairs(heads_of(other[1])) do
            free = free and string.sub(entry, -36, -17) > A.rank
          end
        end
      end
      if free then
        return offer
      end
    end
  end
end

-- Whether the provider session in which it goes on is this machine's, or nobody's.
local function may_run_here(conv)
  conv = conv or (A.fork_of and find(A.fork_of))
  local node = conv and home_of(conv, A.route)
  return not node or node == R.node
end

local function new_request(conv, state, rank)
  A.rank = rank
  local rec = make_request(conv, state, A, ARGS[3])
  set(rec, 'requeued_from', A.requeued_from)
  set(rec, 'due', state == 'scheduled' and not A.question and A.due or nil)
  if state == 'scheduled' and A.question then
    ask(rec, A.question, A.text)
  end
  set(rec, 'expires', A.expires)
  set(rec, 'watchers', R.life)
  return rec
end

-- -- chains -----------------------------------------------------------------------------------------------------------

-- Where a new member would stand, before anything of it is written: {chain or figures, limits, depth, parent}; or a
-- refusal.
local function arriving()
  local membership = A.chain
  if not membership.parent then
    if text('chain:' .. A.request_id) then
      return nil, {error = 'chain_known', name = A.request_id}
    end
    local figures = {started = tonumber(A.wall), used = 0, reserved = 0, guards = 0}
    return {figures = figures, limits = membership.limits, depth = 0}
  end
  local key = text('id:' .. membership.parent)
  local parent = key and request(key)
  if not parent or parent.external then
    return nil, {error = 'unknown_parent'}
  end
  local link = link_of(parent)
  if link then
    local limits = within(membership.limits, link.limits)
    return {chain = chain_of(parent), figures = chain_of(parent), limits = limits, depth = link.depth + 1, parent = parent}
  end
  if text('chain:' .. parent.id) then
    return nil, {error = 'chain_known', name = parent.id}
  end
  local figures = {started = tonumber(parent.enqueued), used = tonumber(parent.spent) or 0, reserved = 0, guards = 0}
  return {figures = figures, limits = within(membership.limits, R.chain_limits), depth = 1, parent = parent}
end

-- Begin a chain with its root: the new request, or the parent that was in none when it came.
local function begin_chain(rec, place)
  local root = place.parent
  if not root then
    return new_chain(rec.id, place.limits, tonumber(A.wall), tonumber(A.wall))
  end
  local chain = new_chain(root.id, R.chain_limits, tonumber(root.enqueued), tonumber(root.enqueued))
  local link = add_member(root, chain, {estimate = 0, guard = false}, R.chain_limits, 0)
  if FINAL[root.state] then
    remove('cho:' .. chain.number, root.key)
  end
  chain.used, chain.estimated = place.figures.used, tonumber(root.guessed) or 0
  put(link, 'tokens', chain.used)
  put(link, 'estimated', chain.estimated > 0)
  return chain
end

local function join(rec, place, block)
  local membership = A.chain
  local chain = place.chain or begin_chain(rec, place)
  if membership.block and membership.trips then
    trip(chain, membership.block)
  end
  local mark = membership.marked and ARGS[4] or nil
  return add_member(rec, chain, membership, place.limits, place.depth, place.parent, block, mark)
end

-- Keep a request that its chain has no place for.
local function keep_blocked(place, block)
  local conv = conversation_named(A.conversation, A.fork_of, A.request_id)
  if A.agent then
    add_agent(conv, A.agent)
  end
  note_route(A.route)
  set(conv, 'active', A.wall)
  local rec = new_request(conv, 'blocked', A.rank)
  set(rec, 'error', 'blocked')
  set(rec, 'message', block.message)
  set(rec, 'finished', A.wall)
  local link = join(rec, place, block)
  index(rec, true)
  refresh(conv)
  return {
    request_id = rec.id,
    conversation = conv.name,
    state = 'blocked',
    block = block,
    chain = chain_view(chain_of(rec), link),
  }
end

-- Stop a holder for `rec`: a running one is marked, another one ends here.
local function interrupt(holder, by)
  set(holder, 'interrupted_by', holder.interrupted_by or by.id)
  if holder.state == 'running' then
    set(holder, 'cancelling', '1')
    tell(holder.life, {kind = 'stop', name = holder.id})
    return nil
  end
  return finish(holder, 'cancelled', 'cancelled')
end

verb('enqueue', function()
  local known, bytes = kept()
  if known then
    return known, bytes
  end
  local place, refusal
  if A.chain then
    place, refusal = arriving()
    if refusal then
      return refusal
    end
  end
  if A.fork_of and not find(A.fork_of) then
    return {error = 'no_fork_parent'}
  end
  if place then
    local block = may_enter(place.figures, place.limits, place.depth, A.chain.block, A.chain.guard, A.chain.estimate)
    if block then
      return keep_blocked(place, block)
    end
  end
  local delayed = A.question or (A.due and A.due > A.wall)
  local conv = find(A.conversation)
  local holder = conv and holder_of(conv)
  local head = conv and head_of_line(conv)
  local interrupted
  if not delayed and (holder or head) and A.on_busy ~= 'enqueue' then
    if A.on_busy == 'reject' then
      return busy(conv, holder)
    end
    if holder then
      if holder.external or tonumber(holder.priority) < A.priority then
        return busy(conv, holder)
      end
      interrupted = holder
    end
  end
  local facts, context
  if A.caps then
    local past = conv or (A.fork_of and find(A.fork_of))
    facts = {agent = A.agent, session = conv and conv.name or A.conversation}
    context = past and tonumber(past.context) or 0
    local over = budgets.refusal(A.demand, facts, context)
    if over then
      return {error = 'over_budget', over = over}
    end
  end
  local ready = not delayed and not holder and not head
  local stopped = is_paused(A.agent, conv and conv.name or A.conversation, A.priority)
  local offer = ready and not stopped and #A.offers > 0 and may_run_here(conv) and free_offer() or nil
  if offer and not alive() then
    return {error = 'dead_life'}
  end
  local hold
  if offer and A.caps then
    hold = budgets.room(A.demand, offer[2], A.model, #ARGS[3], facts, context)
    offer = hold and offer
  end
  if not offer and waiting_requests() >= R.max_queued then
    return {error = 'queue_full'}
  end
  local grant
  if offer and place then
    local chain = A.chain
    local block
    block, grant = may_run(place.figures, place.limits, place.depth, chain.estimate, chain.output_cap, chain.guard)
    if block then
      return keep_blocked(place, block)
    end
  end

  -- All is decided; from here on the store changes.
  conv = conversation_named(A.conversation, A.fork_of, A.request_id)
  if A.agent then
    add_agent(conv, A.agent)
  end
  note_route(A.route)
  local rank = A.rank
  if not delayed and A.on_busy == 'interrupt' and head then
    local ahead = decrement(head.rank)
    rank = ahead < rank and ahead or rank
  end
  local rec = new_request(conv, offer and 'running' or delayed and 'scheduled' or 'queued', rank)
  if place then
    join(rec, place)
  end
  if not offer then
    index(rec, true)
  end
  local map = {request_id = rec.id, conversation = conv.name, ready = ready or false}
  if offer then
    map.claim = run(rec, offer, A.token, grant, hold)
    map.state = 'running'
    return map
  end
  set(conv, 'active', A.wall)
  if interrupted then
    map.passing, map.injections = interrupt(interrupted, rec)
    if not map.passing then
      map.stopping = interrupted.id
    end
  end
  refresh(conv)
  map.state = rec.state
  map.position = delayed and 0 or before(conv, rec.rank, rec.key)
  map.holder = name_of(holder_of(conv))
  return map
end)
