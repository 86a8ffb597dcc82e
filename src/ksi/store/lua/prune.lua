-- prune: take away one step's worth of what is past its retention (R7).
--
-- ARGV[2]  finished, active, spent (times up to which it goes), daemons (last seen before: gone for good), limit, wall
-- Answer   the fields of `Pruned`

local SKIP = 50  -- what the response log does not have yet stands together: a step that meets so many ends there
local TURNS = 500  -- turns of forgotten conversations that one step deletes

local marks  -- how far each daemon's response log is

-- Whether the response log has a turn, or its daemon will never write it (R3).
local function logged(turn, logger)
  if not turn then
    return true
  end
  marks[logger] = marks[logger] or direct('HGET', P .. 'logged', logger) or NONE
  if turn <= marks[logger] then
    return true
  end
  return logger ~= R.daemon and (direct('HGET', P .. 'seen', logger) or A.wall) < A.daemons
end

local passed

-- Note that something stays that the response log does not have; whether the step has met enough of that.
local function spared()
  passed = passed + 1
  return passed >= SKIP
end

-- Up to limit + 1 finished requests whose time is over, the oldest first.
local function old_requests()
  local found = {}
  local reach = A.limit + 1 + SKIP
  for _, entry in ipairs(call('ZRANGEBYLEX', P .. 'finished', '-', '[' .. A.finished .. ':', 'LIMIT', 0, reach)) do
    local rec = request(string.sub(entry, 21))
    local link = link_of(rec)
    if logged(rec.turn, rec.logger) and not (link and link.routing == 2) then
      found[#found + 1] = rec
      if #found > A.limit then
        break
      end
    elseif spared() then
      break
    end
  end
  return found
end

-- A member is no longer kept; with the last one its chain goes.
local function leave_chain(rec)
  local chain = chain_of(rec)
  remove('chm:' .. chain.number, rec.key)
  forget_record(link_of(rec))
  call('DEL', P .. 'm:' .. rec.key)
  if call('EXISTS', P .. 'chm:' .. chain.number) == 0 then
    remove('chains', chain.number)
    call('DEL', P .. 'chain:' .. chain.name)
    forget_record(chain)
  end
end

-- Forget deliveries that ended long ago; whether there are more.
local function drop_deliveries()
  local old = call('ZRANGEBYLEX', P .. 'injections_ended', '-', '[' .. A.finished .. ':', 'LIMIT', 0, A.limit + 1)
  for at = 1, math.min(#old, A.limit) do
    local inj = record('i:' .. string.sub(old[at], 21))
    remove('injections_ended', old[at])
    remove('injections', inj.number)
    remove('injections:' .. inj.state, inj.number)
    call('DEL', P .. 'inj:' .. inj.id, P .. 'ix:' .. inj.number, P .. 'ic:' .. inj.number)
    forget_record(inj)
  end
  return #old > A.limit
end

local function drop_request(rec)
  local conv = conversation(rec.conversation)
  index(rec, false)
  drop('a:' .. rec.key, 'id:' .. rec.id)
  if rec.turn then
    remove('log:' .. rec.logger, rec.turn)
  else
    drop('b:' .. rec.key)
  end
  if rec.chain then
    leave_chain(rec)
  end
  forget_record(rec)
  set(conv, 'members', tonumber(conv.members) - 1)
  reindex(conv)
end

-- The conversation that has been idle longest, if it is past its retention and its head is in the log.
local function first_idle()
  local at = 0
  while true do
    local entry = look('ZRANGEBYLEX', 'idle', '-', '[' .. A.active .. ':', 'LIMIT', at, 1)[1]
    if not entry then
      return nil
    end
    local conv = conversation(string.sub(entry, 21))
    if logged(conv.head, conv.logger) then
      return conv
    end
    if spared() then
      return nil
    end
    at = at + 1
  end
end

local function forget(conv)
  local number = conv.number
  remove('idle', conv.idle)
  remove('sessions', number)
  drop('name:' .. conv.name)
  for _, alias in ipairs(direct('SMEMBERS', P .. 'cx:' .. number)) do
    drop('name:' .. alias)
  end
  for _, agent in ipairs(look('ZRANGE', 'ca:' .. number, 0, -1)) do
    remove('as:' .. agent, number)
  end
  for _, fork in ipairs(direct('SMEMBERS', P .. 'cf:' .. number)) do
    remove('tree:' .. conv.root, fork)
    remove('forks', fork)
    drop('f:' .. fork)
  end
  drop('cx:' .. number, 'ca:' .. number, 'cf:' .. number)
  if conv.turns ~= '0' then
    direct('RPUSH', P .. 'trash', number .. conv.head)
  end
  local parent = conv.parent and conversation(conv.parent)
  forget_record(conv)
  if parent then
    set(parent, 'children', tonumber(parent.children) - 1)
    reindex(parent)
  end
end

-- Delete turns of forgotten conversations, from the last one back to where each began.
local function empty_trash()
  local entry
  for _ = 1, TURNS do
    entry = entry or direct('LPOP', P .. 'trash')
    if not entry then
      break
    end
    local number, turn = string.sub(entry, 1, 16), string.sub(entry, 17)
    local kept = direct('GETRANGE', P .. 't:' .. turn, 0, 47)
    if string.sub(kept, 33, 48) == number then
      drop('t:' .. turn, 'b:' .. string.sub(kept, 17, 32))
      entry = number .. string.sub(kept, 1, 16)
    else
      entry = nil
    end
  end
  if entry then
    direct('LPUSH', P .. 'trash', entry)
  end
  flush()
end

verb('prune', function()
  passed, marks = 0, {}
  local old = old_requests()
  for at = 1, math.min(#old, A.limit) do
    drop_request(old[at])
  end
  local spent = call('ZRANGEBYLEX', P .. 'account', '-', '[' .. A.spent .. ':', 'LIMIT', 0, 1000)
  if #spent > 0 then
    call('ZREM', P .. 'account', unpack(spent))
  end
  local deliveries = drop_deliveries()
  local conversations = 0
  passed = 0
  local idle = first_idle()
  while idle and conversations < A.limit - #old do
    forget(idle)
    conversations = conversations + 1
    idle = first_idle()
  end
  empty_trash()
  return {
    requests = math.min(#old, A.limit),
    conversations = conversations,
    more = #old > A.limit or deliveries or idle ~= nil or call('EXISTS', P .. 'trash') == 1,
  }
end)
