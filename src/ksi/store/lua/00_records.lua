-- Records, numbers and registration: what every verb stands on.
--
-- KEYS[1]  the namespace, `{ksi:<namespace>}`: all keys of one namespace begin with it and so live in one slot.
-- ARGV[1]  what a daemon says with every call, as a MessagePack map: life daemon node lease hand, and its rules
-- ARGV[2]  the arguments as a MessagePack map; further ARGV are bytes that Lua does not look into. A call that is sent
--          again has a last one more, `again`.
-- Answer   a MessagePack map; where bytes go with it, a list of that map and the bytes.
--
-- `packed` is a STRING with a MessagePack map. Every ordered index is a ZSET of score 0 whose members sort by their text, so that order is exact beyond 2^53:
-- numbers of records have 16 digits, times and ranks 20. Layout 1, behind `<namespace>:`
--
--   meta            HASH    layout, the last life, and until when nobody is declared dead
--   count           packed  requests by state (Q8), and the last number of each series (member, turn, fence, ...)
--   id:<request>    STRING  key of a request or external lock (Q4, L5)
--   name:<name>     STRING  number of a conversation, by its name or a provider session that means it (L7)
--   r:<key>         packed  a request, or an external holder or waiter (`external` = 1)
--   b:<key>         STRING  a request's body, kept as long as its turn
--   a:<key>         LIST    its ended attempts: kind (T turn, I interrupted, F fenced, O other), number, attempt
--   c:<number>      packed  a conversation
--   t:<turn>        STRING  a completed turn: previous, key, conversation (16 each), size, answer's size (12 each),
--                           flag, length of the agent's name (6), the name, the attempt
--   f:<fork>        STRING  a fork
--   l:<number>      ZSET    a conversation's line, rank + key
--   ca: cx: cf:     its agents in order (ZSET), provider sessions and forks (SETs), by conversation
--   ready:<route>   ZSET    rank + key of what can run now;   routes  ZSET  every route there ever was
--   slots:<provider> SET    keys that run at a provider
--   active delayed perish finished failed parked:<route>    ZSETs of requests by key or time + key
--   locks waiters deadlines held lined                      ZSETs of external locks, waiters, held conversations, lines
--   sessions idle as:<agent> forks tree:<root> log:<daemon> account  ZSETs
--   trash           LIST    turns of forgotten conversations that are still to be deleted
--   lives dead life:<life> daemons                          who serves, and until when (D2)
--   runs:<life> ext:<life>                                  ZSETs of what a daemon's life is answerable for
--   ops:<life>      HASH    the last answers, by operation, so that a call sent again changes nothing

local P  -- the namespace's prefix, of the call that is being served
local A  -- its arguments
local ARGS  -- its ARGV
local R  -- who calls, and by which rules
local call  -- redis.call, which is not there while the library is loaded

local cache, names, found_names, dirty, counts, counted, lines, now, woke

-- -- numbers ----------------------------------------------------------------------------------------------------------

local NONE = '0000000000000000'

local function key16(number)
  return string.format('%016.0f', number)
end

local function pad20(number)
  return string.format('%020.0f', number)
end

-- A padded number without its padding.
local function bare(text)
  return text and (string.gsub(text, '^0+(%d)', '%1'))
end

-- The decimal text before this one; ranks are beyond the numbers of Lua.
local function decrement(text)
  local at = #text
  while string.byte(text, at) == 48 do
    at = at - 1
  end
  return string.sub(text, 1, at - 1) .. string.char(string.byte(text, at) - 1) .. string.rep('9', #text - at)
end

-- The store's monotonic time in microseconds: the server's (L4).
local function time()
  if not now then
    if R.hand then
      now = A.mono
    else
      local parts = call('TIME')
      now = tonumber(parts[1]) * 1000000 + tonumber(parts[2])
    end
  end
  return now
end

-- -- counts -----------------------------------------------------------------------------------------------------------

-- A figure, read with all others once in a call and written with them at its end.
local function count(name)
  if not counts then
    local packed = call('GET', P .. 'count')
    counts = packed and cmsgpack.unpack(packed) or {}
  end
  return counts[name] or 0
end

local function set_count(name, value)
  count(name)
  counts[name], counted = value, true
end

local function next_number(series)
  local number = count(series) + 1
  set_count(series, number)
  return number
end

-- -- records ----------------------------------------------------------------------------------------------------------

-- A record as a table, read once in a call and written once at its end; nil where there is none. Its values are texts.
local function record(name)
  local found = cache[name]
  if found == nil then
    local packed = call('GET', P .. name)
    found = packed and cmsgpack.unpack(packed)
    if found then
      names[found] = name
    end
    cache[name] = found
  end
  return found or nil
end

local function new_record(name)
  local made = {}
  cache[name], names[made] = made, name
  return made
end

local function set(rec, field, value)
  if type(value) == 'number' then
    value = string.format('%.0f', value)
  end
  rec[field] = value
  dirty[rec] = true
end

local function forget_record(rec)
  call('DEL', P .. names[rec])
  cache[names[rec]] = false
  dirty[rec] = nil
end

local function flush()
  if counted then
    call('SET', P .. 'count', cmsgpack.pack(counts))
  end
  for rec in pairs(dirty) do
    call('SET', P .. names[rec], cmsgpack.pack(rec))
  end
end

local function request(key)
  return record('r:' .. key)
end

local function conversation(number)
  return record('c:' .. number)
end

local function find(name)
  local number = found_names[name]
  if number == nil then
    number = call('GET', P .. 'name:' .. name)
    found_names[name] = number
  end
  return number and conversation(number) or nil
end

local function first(index)
  return call('ZRANGE', P .. index, 0, 0)[1]
end

local function add(index, member)
  call('ZADD', P .. index, 0, member)
end

local function remove(index, member)
  call('ZREM', P .. index, member)
end

-- -- registration -----------------------------------------------------------------------------------------------------

local RING = 1024  -- answers kept of each life: more than are ever under way

local CALLERS, callers = {}, 0  -- what callers say of themselves, unpacked once

local function caller(packed)
  local found = CALLERS[packed]
  if not found then
    if callers == 100 then
      CALLERS, callers = {}, 0
    end
    found = cmsgpack.unpack(packed)
    CALLERS[packed], callers = found, callers + 1
  end
  return found
end

local function begin(keys, args)
  call = redis.call
  P = keys[1] .. ':'
  ARGS = args
  R = caller(args[1])
  A = cmsgpack.unpack(args[2])
  cache, names, found_names, dirty, lines = {}, {}, {}, {}, {}
  counts, counted, now, woke = nil, false, nil, false
end

-- Tell one other life something. It is a hint: the store is the truth, and who misses it looks again later (D1).
local function tell(life, news)
  if life and life ~= R.life then
    call('PUBLISH', P .. 'to:' .. life, cmsgpack.pack(news))
  end
end

-- Tell the other lives that something may be done: each once until it asks for work.
local function tell_work()
  for _, life in ipairs(call('ZRANGE', P .. 'lives', 0, -1)) do
    if life ~= R.life and call('SADD', P .. 'woken', life) == 1 then
      tell(life, {kind = 'work'})
    end
  end
end

local function pack(map)
  if next(map) == nil then
    map.work = false  -- an empty table would be packed as a list
  end
  return cmsgpack.pack(map)
end

local function answer(packed, bytes)
  if bytes then
    table.insert(bytes, 1, packed)
    return bytes
  end
  return packed
end

-- A verb that changes something. `A.op` names the call: sent again it is answered as the first time, and changes nothing.
-- A body answers a map, and a function that gives the bytes to go with it. A map with `error`
-- wrote nothing, and one with `existing` nothing that counts.
local function verb(name, body)
  redis.register_function(LIBRARY .. '_' .. name, function(keys, args)
    begin(keys, args)
    local ring, slot, op = P .. 'ops:' .. R.life, A.op % RING, string.format('%.0f ', A.op)
    if ARGS[#ARGS] == 'again' then
      local known = call('HGET', ring, slot)
      if known and string.sub(known, 1, #op) == op then
        return answer(string.sub(known, #op + 1))
      end
    end
    local alone = call('GET', P .. 'stop')
    if alone and alone ~= R.life and name ~= 'open' then
      return answer(pack({error = 'stopped'}))
    end
    local map, bytes = body()
    if map.existing then
      flush()
    end
    if map.error or map.existing then
      return answer(pack(map), bytes)
    end
    flush()
    map.work = woke or nil
    if woke then
      tell_work()
    end
    local packed = pack(map)
    call('HSET', ring, slot, op .. packed)
    return answer(packed, bytes)
  end)
end

-- A verb that only reads.
local function read(name, body)
  redis.register_function({
    function_name = LIBRARY .. '_' .. name,
    callback = function(keys, args)
      begin(keys, args)
      local map, bytes = body()
      return answer(pack(map), bytes)
    end,
    flags = {'no-writes'},
  })
end
