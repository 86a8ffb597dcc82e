-- claim: start ready requests, the lowest (rank, key) first over all offered routes (Q2, Q6).
--
-- ARGV[2]  offers {{route, provider, limit, by_node, terms}}, token, limit, wall
-- Answer   started: claims without their bodies; blocked: members whose chain has no place any more; waits: microseconds
--          until a provider's terms let a call begin; the bodies

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

verb('claim', function()
  direct('SREM', P .. 'woken', R.life)
  if not alive() then
    return {error = 'dead_life'}
  end
  local started, blocked, bodies, heads, rooms = {}, {}, {}, {}, {}
  for _ = 1, A.limit do
    local best, by
    for _, offer in ipairs(A.offers) do
      local slot = slot_of(offer)
      rooms[slot] = rooms[slot] or size('slots:' .. slot)
      if rooms[slot] < offer[3] and (not offer[5] or terms.room(offer, slot) > 0) then
        if heads[offer[1]] == nil then
          heads[offer[1]] = first_ready(offer[1]) or false
        end
        local entry = heads[offer[1]]
        if entry and (not best or entry < best) then
          best, by = entry, offer
        end
      end
    end
    if not best then
      break
    end
    local rec = request(string.sub(best, 21))
    local block, grant = link_may_run(rec)
    if block then
      blocked[#blocked + 1] = ended(rec, 'blocked', 'blocked', block.message, block)
      heads = {}
    else
      started[#started + 1] = run(rec, by, A.token, grant)
      bodies[#bodies + 1] = text('b:' .. rec.key)
      heads[by[1]] = nil
      rooms[slot_of(by)] = rooms[slot_of(by)] + 1
    end
  end
  return {started = started, blocked = blocked, waits = waits()}, bodies
end)
