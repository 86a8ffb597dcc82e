-- expire, unpark: what time asks for.
--
-- ARGV[2]  wall, limit, lock_expiry, position_limit, mono; unpark: route; and what recovery takes
-- Answer   the fields of `Expiry`; {count}

-- The first record of an index whose time has come.
local function reached(name, now)
  local entry = first(name)
  if entry and string.sub(entry, 1, 20) <= now then
    return request(string.sub(entry, 21))
  end
end

-- The next thing to do, waiters that gave up first, so that none of them is granted a lock that lapses now.
local function expire_one(now, map)
  local waiter = reached('deadlines', now)
  if waiter then
    table.insert(map.lapsed, lapse(waiter))
    return true
  end
  local late = reached('perish', A.wall)
  if late then
    table.insert(map.ended, ended(late, 'expired'))
    return true
  end
  local due = reached('delayed', A.wall)
  if due then
    become(due, 'queued', function()
      set(due, 'due', nil)
      set(due, 'asks', nil)
    end)
    if not holds(due) then
      turns.take(due)
    end
    refresh(conversation(due.conversation))
    map.woken = map.woken + 1
    return true
  end
  local holder = reached('locks', now)
  if holder then
    table.insert(map.lapsed, lapse(holder))
    return true
  end
  return false
end

local function soonest(one, other)
  one, other = first(one), first(other)
  one, other = one and string.sub(one, 1, 20), other and string.sub(other, 1, 20)
  return one and other and math.min(tonumber(one), tonumber(other)) or tonumber(one or other)
end

verb('expire', function()
  local now = pad20(time())
  local map = {woken = 0, ended = {}, lapsed = {}}
  for _ = 1, A.limit do
    if not expire_one(now, map) then
      break
    end
  end
  map.woken = map.woken + budgets.bring_back_ended(A.limit)
  local mono = soonest('locks', 'deadlines')
  local over = first('ends_over')
  map.next_wall = soonest('delayed', 'perish')
  map.next_wall = over and math.min(tonumber(string.sub(over, 1, 20)), map.next_wall or math.huge) or map.next_wall
  map.next_mono = mono and mono - time() + A.mono
  map.more = (map.next_wall and map.next_wall <= tonumber(A.wall)) or (mono and mono <= time()) or false
  return map
end)

verb('unpark', function()
  local behind = '(' .. A.wall .. ':'
  local entries = call('ZRANGEBYLEX', P .. 'parked:' .. A.route, behind, '+', 'LIMIT', 0, A.limit)
  for _, entry in ipairs(entries) do
    local rec = request(string.sub(entry, 21))
    become(rec, 'parked', function() set(rec, 'due', A.wall) end)
  end
  return {count = #entries}
end)
