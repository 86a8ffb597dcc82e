-- prune: take away one step's worth of what is past its retention.
--
-- ARGV[2]  finished, active, spent (times up to which it goes), daemons (last seen before: gone for good), limit, wall
-- Answer   the fields of `Pruned`

local SKIP = 50  -- what the response log does not have yet stands together: a step that meets so many ends there
local TURNS = 500  -- turns of forgotten conversations that one step deletes

local marks  -- how far each daemon's response log is

-- Whether the response log has a turn, or its daemon will never write it.
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
  local link = link_of(rec)
  remove('chm:' .. chain.number, rec.key)
  forget_record(link)
  call('DEL', P .. 'm:' .. rec.key)
  if call('EXISTS', P .. 'chm:' .. chain.number) == 0 then
    remove('chains', chain.number)
    call('DEL', P .. 'chain:' .. chain.name)
    forget_record(chain)
  elseif link.guard then
    more_of(chain, 'notices', -1)
  end
end

local function drop_delivery(inj)
  remove('injections', inj.number)
  remove('injections:' .. inj.state, inj.number)
  drop('inj:' .. inj.id)
  passages.drop('ix:' .. inj.number)
  passages.drop('ic:' .. inj.number)
  forget_record(inj)
end

-- Forget deliveries that ended long ago; whether there are more.
local function drop_deliveries()
  local old = call('ZRANGEBYLEX', P .. 'injections_ended', '-', '[' .. A.finished .. ':', 'LIMIT', 0, A.limit + 1)
  for at = 1, math.min(#old, A.limit) do
    local inj = record('i:' .. string.sub(old[at], 21))
    remove('injections_ended', old[at])
    drop_delivery(inj)
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
    passages.drop('b:' .. rec.key)
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
      drop('t:' .. turn)
      passages.drop('b:' .. string.sub(kept, 17, 32))
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

-- -- owners' hands ------------------------------------------------------------------------------------------------------
--
-- rename       name, to               answer: `name` that it had, or `error`
-- doomed       index, after, limit, number    which of a list's requests or deliveries belong to a conversation, and where the
--              page ends: requests as {key, id, final}, deliveries as numbers
-- delete       name, number, keys, deliveries; then `empty` until it says that it is done
-- reaccount    entries of the account, each before the one that takes its place, as bytes

verb('rename', function()
  local conv = find(A.name)
  if not conv then
    return {error = 'unknown'}
  end
  local meant, before = find(A.to), conv.name
  if meant and meant ~= conv then
    return {error = 'taken'}
  end
  if before == A.to then
    return {name = before}
  end
  if text('name:' .. A.to) then
    direct('SREM', P .. 'cx:' .. conv.number, A.to)
  end
  direct('SADD', P .. 'cx:' .. conv.number, before)
  put_text('name:' .. A.to, conv.number)
  set(conv, 'name', A.to)
  for _, number in ipairs(look('ZRANGE', 'tree:' .. conv.root, 0, -1)) do
    local fork = cmsgpack.unpack(text('f:' .. number))
    if fork.parent == before or fork.child == before then
      fork.parent = fork.parent == before and A.to or fork.parent
      fork.child = fork.child == before and A.to or fork.child
      put_text('f:' .. number, cmsgpack.pack(fork))
    end
  end
  return {name = before}
end)

local OWN = {
  asking = function(entry, conv)
    return request(entry).conversation == conv.number and entry
  end,
  delayed = function(entry, conv)
    local rec = request(string.sub(entry, 21))
    return rec.conversation == conv.number and rec.key
  end,
  finished = function(entry, conv)
    local rec = request(string.sub(entry, 21))
    return rec.conversation == conv.number and rec.key
  end,
  injections_ended = function(entry, conv, names, ids)
    local inj = record('i:' .. string.sub(entry, 21))
    return (names[inj.target] or ids[inj.parent]) and inj.number
  end,
}

local function names_of(conv)
  local names = {[conv.name] = true}
  for _, alias in ipairs(direct('SMEMBERS', P .. 'cx:' .. conv.number)) do
    names[alias] = true
  end
  return names
end

read('doomed', function()
  local conv = find(A.name)
  if not conv then
    return {error = 'unknown'}
  end
  local names, found = names_of(conv), {}
  local entries = direct('ZRANGEBYLEX', P .. A.index, A.after and '(' .. A.after or '-', '+', 'LIMIT', 0, A.limit)
  for _, entry in ipairs(entries) do
    local member = OWN[A.index](entry, conv, names, A.ids or {})
    if member then
      found[#found + 1] = member
    end
  end
  return {members = found, after = #entries == A.limit and entries[#entries] or nil}
end)

read('ids_of', function()
  local ids = {}
  for _, key in ipairs(A.keys) do
    local rec = request(key)
    ids[#ids + 1] = rec and rec.id or nil
  end
  return {ids = ids}
end)

-- What of a conversation has not ended, or false; nil where it is not known which requests there are.
local function in_use(conv)
  local first_of = holder_of(conv) or head_of_line(conv)
  if first_of then
    return first_of.id
  end
  local known_ones = 0
  for _, key in ipairs(A.keys) do
    local rec = request(key)
    if rec and rec.conversation == conv.number then
      local link = link_of(rec)
      if link and link.routing == 2 then
        return rec.id
      end
      known_ones = known_ones + 1
    end
  end
  if known_ones < tonumber(conv.members) then
    return nil
  end
  return false
end

local function forks_of(conv)
  local names = {}
  for _, number in ipairs(look('ZRANGE', 'tree:' .. conv.root, 0, -1)) do
    local fork = cmsgpack.unpack(text('f:' .. number))
    local child = find(fork.child)
    if child and child.parent == conv.number then
      names[child.number] = child.name
    end
  end
  local numbers, sorted = {}, {}
  for number in pairs(names) do
    numbers[#numbers + 1] = number
  end
  table.sort(numbers)
  for _, number in ipairs(numbers) do
    sorted[#sorted + 1] = names[number]
  end
  return sorted
end

verb('delete', function()
  local conv = find(A.name)
  if not conv then
    return {error = 'unknown'}
  end
  local member = in_use(conv)
  if member ~= false then
    return {error = 'in_use', member = member, name = conv.name}
  end
  local forks = forks_of(conv)
  if #forks > 0 then
    return {error = 'forks', forks = forks, name = conv.name}
  end
  local names, aliases = names_of(conv), {}
  for alias in pairs(names) do
    if alias ~= conv.name then
      aliases[#aliases + 1] = alias
    end
  end
  table.sort(aliases)
  local targets, deliveries = {}, 0
  local function drop_one(number)
    local inj = record('i:' .. number)
    if inj then
      if inj.finished then
        remove('injections_ended', pad20(inj.finished) .. inj.number)
      end
      if not names[inj.target] then
        targets[#targets + 1] = inj.target
      end
      drop_delivery(inj)
      deliveries = deliveries + 1
    end
  end
  for _, number in ipairs(A.deliveries) do
    drop_one(number)
  end
  for _, number in ipairs(look('ZRANGE', 'rm:' .. conv.number, 0, -1)) do
    drop_one(number)
  end
  call('DEL', P .. 'rm:' .. conv.number)
  set(conv, 'reminding', nil)
  for _, key in ipairs(A.keys) do
    drop_request(request(key))
  end
  reindex(conv)
  local map = {
    name = conv.name,
    created_at = bare(conv.created),
    turns = conv.turns,
    aliases = aliases,
    targets = targets,
    deliveries = deliveries,
  }
  forget(conv)
  return map
end)

verb('empty', function()
  empty_trash()
  return {more = call('EXISTS', P .. 'trash') == 1}
end)

verb('reaccount', function()
  for at = 3, #ARGS, 2 do
    if call('ZREM', P .. 'account', ARGS[at]) == 1 then
      call('ZADD', P .. 'account', 0, ARGS[at + 1])
    end
  end
  return {}
end)

read('names', function()
  local names = {}
  for at, name in ipairs(A.names) do
    local conv = find(name)
    names[at] = conv and conv.name or ''
  end
  return {names = names}
end)

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
  budgets.prune(A.budgets, A.limit)
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
