-- claim: start ready requests, the lowest (rank, key) first over all offered routes.
--
-- ARGV[2]  offers {{route, provider, limit, by_node, terms}}, token, limit, wall, paused, aside
--          caps: budgets as they are now; end_over: key, block
-- Answer   started: claims without their bodies; stopped: what must not wait for its budget; notices: what to tell; blocked: members whose chain has no place any more; waits: microseconds
--          until a provider's terms let a call begin; more: whether it set aside all that one claim does; the bodies

-- Providers whose minute is used up, and for how long.
local function waits()
  local found
  for _, offer in ipairs(A.offers) do
    local wait = offer[5] and terms.wait(offer, slot_of(offer)) or 0
    if wait > 0 then
      found = found or {}
      found[offer[2]] = wait
    end
  end
  return found
end

local function stopped(rec)
  return is_paused(rec.agent, conversation(rec.conversation).name, rec.priority)
end

local function put_aside(rec)
  local conv = conversation(rec.conversation)
  unready(conv)
  make_ready(conv, conv.ready, conv.ready_route, ASIDE)
end

-- Set aside what stands paused at the beginning of a lane, at most `limit`; how much that was. A long run of it is read at
-- once: one by one each would be looked for behind the one before it.
local function set_aside(name, limit)
  local head = A.paused and limit > 0 and first('ready:' .. name)
  if not head or not stopped(request(key_in(head))) then
    return 0
  end
  local entries = look('ZRANGE', 'ready:' .. name, 0, limit - 1)
  for at, entry in ipairs(entries) do
    local rec = request(key_in(entry))
    if not stopped(rec) then
      return at - 1
    end
    put_aside(rec)
  end
  return #entries
end

verb('claim', function()
  direct('SREM', P .. 'woken', R.life)
  if not alive() then
    return {error = 'dead_life'}
  end
  local started, blocked, bodies, heads, rooms, aside = {}, {}, {}, {}, {}, 0
  local notices, stopped_by, waiting = {}, {}, false
  while #started + #blocked < A.limit and aside < A.aside do
    local bests, bys = {}, {}
    for _, offer in ipairs(A.offers) do
      local slot = slot_of(offer)
      rooms[slot] = rooms[slot] or size('slots:' .. slot)
      if rooms[slot] < offer[3] and (not offer[5] or terms.room(offer, slot) > 0) then
        if heads[offer[1]] == nil then
          aside = aside + set_aside(offer[1], A.aside - aside)
          if count('bound') > 0 then
            aside = aside + set_aside(lane(offer[1], R.node), A.aside - aside)
          end
          heads[offer[1]] = heads_of(offer[1])
        end
        for priority, entry in pairs(heads[offer[1]]) do
          if not bests[priority] or entry < bests[priority] then
            bests[priority], bys[priority] = entry, offer
          end
        end
      end
    end
    if not next(bests) or aside >= A.aside then
      break
    end
    local chosen = turns.choose(bests)
    local by = bys[chosen]
    local rec = request(key_in(bests[chosen]))
    local paused = stopped(rec)
    local block, grant, hold, over
    if not paused and A.caps then
      hold, over = budgets.look(rec, by[2])
    end
    if not paused and not over then
      block, grant = link_may_run(rec)
    end
    if paused then
      -- It stands behind one that is too late, and not at the beginning of its lane.
      put_aside(rec)
      heads[by[1]] = nil
      aside = aside + 1
    elseif over then
      -- One that does not wait is set aside as well: the caller finds the words, and ends it.
      budgets.exceeded(over, notices)
      budgets.wait(rec, over)
      waiting = true
      if over.unpriced or over.need > over.limit or (over.refuse and over.used + over.need > over.limit) then
        over.key = rec.key
        stopped_by[#stopped_by + 1] = over
      end
      heads[by[1]] = nil
      aside = aside + 1
    elseif block then
      blocked[#blocked + 1] = ended(rec, 'blocked', 'blocked', block.message, block)
      heads = {}
    else
      started[#started + 1] = run(rec, by, A.token, grant, hold)
      bodies[#bodies + 1] = passages.body(rec.key)
      heads[by[1]] = nil
      rooms[slot_of(by)] = rooms[slot_of(by)] + 1
    end
  end
  return {started = started, blocked = blocked, waits = waits(), more = aside >= A.aside, notices = notices,
    stopped = stopped_by, waiting = waiting}, bodies
end)

-- End a request that waits for a budget which does not let it wait.
verb('end_over', function()
  local rec = request(A.key)
  local conv = rec and conversation(rec.conversation)
  if not rec or rec.state ~= 'queued' or conv.ready ~= place(rec) or not conv.over_line then
    return {}
  end
  return {ended = ended(rec, 'blocked', 'budget_exceeded', A.block.message, A.block)}
end)
