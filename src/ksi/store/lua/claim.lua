-- claim: start ready requests, the lowest (rank, key) first over all offered routes (Q2, Q6).
--
-- ARGV[2]  offers {{route, provider, limit, by_node}}, token, limit, wall
-- Answer   started: claims without their bodies; the bodies in the same order

verb('claim', function()
  call('SREM', P .. 'woken', R.life)
  if not alive() then
    return {error = 'dead_life'}
  end
  local started, bodies, heads, rooms = {}, {}, {}, {}
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
    started[#started + 1] = run(rec, by, A.token)
    bodies[#bodies + 1] = call('GET', P .. 'b:' .. rec.key)
    heads[by[1]] = nil
    rooms[slot_of(by)] = rooms[slot_of(by)] + 1
  end
  return {started = started}, bodies
end)
