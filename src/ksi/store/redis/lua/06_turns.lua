-- Whose turn it is: agents within a priority, and a share for every priority. The rules are those of
-- `ksi.store.rules.fairness`; without them (`R.fair`) the lowest rank comes first.
--
--   flows:<priority>  HASH    the last tag of each flow
--   count             clock0 ... clock4: each priority's virtual clock;   passed0 ... passed4: see `turns.choose`
--
-- A request that waits keeps its `flow` and its `tag`. In its lane it stands as priority (1), tag (20), rank and key.

local turns = {STEP = 1000000, SHARE = 15, KNOWN_FLOWS = 10000}

-- The key at the end of what stands in a lane.
local function key_in(entry)
  return string.sub(entry, -16)
end

function turns.step(flow)
  local weights = R.weights or {}
  local weight, length = weights[flow], -1
  if not weight then
    for name, value in pairs(weights) do
      local beginning = string.sub(name, 1, -2)
      if string.sub(name, -1) == '*' and #beginning > length and string.sub(flow, 1, #beginning) == beginning then
        weight, length = value, #beginning
      end
    end
  end
  return math.max(1, math.floor(turns.STEP / (weight or 1) + 0.5))
end

-- A request begins to wait.
function turns.take(rec)
  if not R.fair or not rec.flow then
    return
  end
  local key = P .. 'flows:' .. rec.priority
  local last = tonumber(direct('HGET', key, rec.flow) or 0)
  local tag = math.max(count('clock' .. rec.priority), last) + turns.step(rec.flow)
  if last == 0 and direct('HLEN', key) >= turns.KNOWN_FLOWS then
    direct('DEL', key)
  end
  direct('HSET', key, rec.flow, string.format('%.0f', tag))
  set(rec, 'tag', tag)
end

-- It begins to run.
function turns.started(rec)
  local clock = 'clock' .. rec.priority
  if R.fair and tonumber(rec.tag or 0) > count(clock) then
    set_count(clock, tonumber(rec.tag))
  end
end

-- What stands before rank and key in a lane.
function turns.before(rec)
  return R.fair and rec.priority .. pad20(tonumber(rec.tag or 0)) or ''
end

-- The priority whose next request runs; `heads` are what each has next.
function turns.choose(heads)
  local first, longest, several
  for priority, entry in pairs(heads) do
    several = several or first ~= nil
    if not first or string.sub(entry, -36) < string.sub(heads[first], -36) then
      first = priority
    end
    local passed = count('passed' .. priority)
    if not longest or passed > count('passed' .. longest) or (passed == count('passed' .. longest) and priority < longest) then
      longest = priority
    end
  end
  if not R.fair or not several then
    if R.fair and first and count('passed' .. first) > 0 then
      set_count('passed' .. first, 0)
    end
    return first
  end
  local chosen = count('passed' .. longest) >= turns.SHARE and longest or first
  for priority in pairs(heads) do
    set_count('passed' .. priority, priority == chosen and 0 or count('passed' .. priority) + 1)
  end
  return chosen
end
