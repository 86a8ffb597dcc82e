-- claim: start ready requests, the lowest (rank, key) first over all offered routes (Q2, Q6).
--
-- ARGV[2]  offers {{route, provider, limit, by_node}}, token, limit, wall
-- Answer   started: claims without their bodies; blocked: members whose chain has no place any more; the bodies

verb('claim', function()
  call('SREM', P .. 'woken', R.life)
  if not alive() then
    return {error = 'dead_life'}
  end
  local started, blocked, bodies, heads, rooms = {}, {}, {}, {}, {}
  for _ = 1, A.limit do
    local best, by
    for _, offer in ipairs(A.offers) do
      local slot = slot_of(offer)
      rooms[slot] = rooms[slot] or call('SCARD', P .. 'slots:' .. slot)
      if rooms[slot] < offer[3] then
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
      bodies[#bodies + 1] = call('GET', P .. 'b:' .. rec.key)
      heads[by[1]] = nil
      rooms[slot_of(by)] = rooms[slot_of(by)] + 1
    end
  end
  return {started = started, blocked = blocked}, bodies
end)
