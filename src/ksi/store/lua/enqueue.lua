-- enqueue: a request into the queue, or straight into running.
--
-- ARGV[2]  request_id conversation route rank priority model agent due expires on_busy hold fork_of requeued_from;
--          offers {{route, provider, limit, by_node}}, token, wall, max_queued
-- ARGV[3]  the body
-- Answer   the fields of `Enqueued`, `claim` without the body; or `existing`, a view with its bytes

-- What is known under the id already, or why the id cannot be taken.
local function kept()
  local key = call('GET', P .. 'id:' .. A.request_id)
  if not key then
    return nil
  end
  local rec = request(key)
  if rec.external then
    return {error = 'lock_id'}
  end
  if call('GET', P .. 'b:' .. key) ~= ARGS[3] then
    return {error = 'other_content'}
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
          local entry = first_ready(other[1])
          if entry and string.sub(entry, 1, 20) <= A.rank then
            free = false
            break
          end
        end
      end
      if free then
        return offer
      end
    end
  end
end

local function add_agent(conv, agent)
  local agents = P .. 'ca:' .. conv.number
  if not call('ZSCORE', agents, agent) then
    call('ZADD', agents, call('ZCARD', agents), agent)
    add('as:' .. agent, conv.number)
  end
end

local function new_request(conv, state, rank)
  local key = key16(next_number('member'))
  local rec = new_record('r:' .. key)
  rec.key = key
  set(rec, 'id', A.request_id)
  set(rec, 'conversation', conv.number)
  set(rec, 'state', state)
  set(rec, 'rank', rank)
  set(rec, 'priority', A.priority)
  set(rec, 'enqueued', A.wall)
  set(rec, 'route', A.route)
  set(rec, 'model', A.model)
  set(rec, 'agent', A.agent)
  set(rec, 'hold', A.hold and '1' or '0')
  set(rec, 'requeued_from', A.requeued_from)
  set(rec, 'due', state == 'scheduled' and A.due or nil)
  set(rec, 'expires', A.expires)
  set(rec, 'watchers', R.life)
  set(conv, 'members', tonumber(conv.members) + 1)
  call('SET', P .. 'id:' .. A.request_id, key)
  call('SET', P .. 'b:' .. key, ARGS[3])
  set_count(state, count(state) + 1)
  add('routes', A.route)
  if state ~= 'running' then
    index(rec, true)
  end
  return rec
end

-- Stop a holder for `rec`: a running one is marked, another one ends here (L3).
local function interrupt(holder, by)
  set(holder, 'interrupted_by', holder.interrupted_by or by.id)
  if holder.state == 'running' then
    set(holder, 'cancelling', '1')
    tell(holder.life, 'stop', holder.id)
    return nil
  end
  return finish(holder, 'cancelled', 'cancelled')
end

verb('enqueue', function()
  local known, bytes = kept()
  if known then
    return known, bytes
  end
  if A.fork_of and not find(A.fork_of) then
    return {error = 'no_fork_parent'}
  end
  local delayed = A.due and A.due > A.wall
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
  local ready = not delayed and not holder and not head
  local offer = ready and #A.offers > 0 and free_offer() or nil
  if offer and not alive() then
    return {error = 'dead_life'}
  end
  if not offer and waiting_requests() >= R.max_queued then
    return {error = 'queue_full'}
  end

  -- All is decided; from here on the store changes.
  conv = conversation_named(A.conversation, A.fork_of, A.request_id)
  if A.agent then
    add_agent(conv, A.agent)
  end
  local rank = A.rank
  if not delayed and A.on_busy == 'interrupt' and head then
    local ahead = decrement(head.rank)
    rank = ahead < rank and ahead or rank
  end
  local rec = new_request(conv, offer and 'running' or delayed and 'scheduled' or 'queued', rank)
  local map = {request_id = rec.id, conversation = conv.name, ready = ready or false}
  if offer then
    map.claim = run(rec, offer, A.token)
    map.state = 'running'
    return map
  end
  set(conv, 'active', A.wall)
  if interrupted then
    map.passing = interrupt(interrupted, rec)
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
