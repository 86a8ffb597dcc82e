-- Records, numbers and registration: what every verb stands on.
--
-- KEYS[1]  the namespace, `{ksi:<namespace>}`: all keys of one namespace begin with it and so live in one slot.
-- ARGV[1]  what a daemon says with every call, as a MessagePack map: life daemon node lease hand, and its rules
-- ARGV[2]  the arguments as a MessagePack map; further ARGV are bytes that Lua does not look into
-- Answer   a MessagePack map; where bytes go with it, a list of that map and the bytes.
--
-- `packed` is a STRING with a MessagePack map. Every ordered index is a ZSET of score 0 whose members sort by their text, so that order is exact beyond 2^53:
-- numbers of records have 16 digits, times and ranks 20. Layout 1, behind `<namespace>:`
--
--   meta            HASH    layout, the last life, and until when nobody is declared dead
--   count           packed  requests by state, and the last number of each series (member, turn, fence, ...)
--   id:<request>    STRING  key of a request or external lock
--   name:<name>     STRING  number of a conversation, by its name or a provider session that means it
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
--   ready:<route>\n<node>  ZSET the same for one machine's daemons alone; in `routes` while there is such
--   ready:<route>\n\1     ZSET the same for nobody: what is paused and was set aside
--   heard lost freeing      ZSETs of machines by when they were last heard of, and the SET of those whose lanes are emptied
--   slots:<provider> SET    keys that run at a provider;   probes: rate: providers   see 15_terms.lua and providers.lua
--   active delayed asking perish finished failed parked:<route>    ZSETs of requests by key or time + key
--   locks waiters deadlines held lined                      ZSETs of external locks, waiters, held conversations, lines
--   sessions idle as:<agent> forks tree:<root> log:<daemon> account  ZSETs
--   trash           LIST    turns of forgotten conversations that are still to be deleted
--   lives dead life:<life> daemons                          who serves, and until when
--   runs:<life> ext:<life>                                  ZSETs of what a daemon's life is answerable for
--   ops:<life>      HASH    the last calls' numbers and answers, so that one that comes again changes nothing

local P  -- the namespace's prefix, of the call that is being served
local A  -- its arguments
local ARGS  -- its ARGV
local R  -- who calls, and by which rules
local direct  -- redis.call, which is not there while the library is loaded

local cache, names, dirty  -- records of this call by name, their names, and those that changed
local counts, counted, lines, now, woke

-- What is to be written, and what was read: for all requests that come in one call.
local texts, gone, indexes, sets, waits  -- STRINGs to set, keys to delete, members of ZSETs and SETs to add or to remove
local known, heads, sizes  -- STRINGs, first members of ZSETs and sizes of SETs as they were read

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

-- The store's monotonic time in microseconds: the server's.
local function time()
  if not now then
    if R.hand then
      now = A.mono
    else
      local parts = direct('TIME')
      now = tonumber(parts[1]) * 1000000 + tonumber(parts[2])
    end
  end
  return now
end

-- -- reading and writing ----------------------------------------------------------------------------------------------
--
-- Each command costs several times what its work costs, so writes wait until the call's end and go out together; then
-- only that is written which was decided whole. `text`, `first`, `size` and `look` see what waits. `call` is for all that
-- is rare: it writes what waits first, and what was read before is read again after it.

-- Up to so many values are given to one command.
local MOST = 1000

local function write_members(how, name, members)
  local args, n, off, m = {}, 0, {}, 0
  for member, there in pairs(members) do
    if not there then
      m = m + 1
      off[m] = member
    else
      if how == 'Z' then
        n = n + 1
        args[n] = 0
      end
      n = n + 1
      args[n] = member
    end
  end
  local key = P .. name
  for at = 1, n, MOST do
    direct(how .. 'ADD', key, unpack(args, at, math.min(n, at + MOST - 1)))
  end
  for at = 1, m, MOST do
    direct(how .. 'REM', key, unpack(off, at, math.min(m, at + MOST - 1)))
  end
end

-- Write what waits for one index.
local function write_index(name)
  local members = indexes[name]
  if members then
    indexes[name] = nil
    write_members('Z', name, members)
  end
end

local flushed  -- how often was written, or read and written by `call`

-- Write all that waits.
local function flush()
  if counted then
    texts.count, counted, waits = cmsgpack.pack(counts), false, true
  end
  for rec in pairs(dirty) do
    texts[names[rec]], waits = cmsgpack.pack(rec), true
  end
  if not waits then
    return
  end
  flushed, waits, dirty = flushed + 1, false, {}
  local args, n = {}, 0
  for name, value in pairs(texts) do
    args[n + 1], args[n + 2] = P .. name, value
    n = n + 2
  end
  for at = 1, n, MOST do
    direct('MSET', unpack(args, at, math.min(n, at + MOST - 1)))
  end
  args, n = {}, 0
  for name in pairs(gone) do
    n = n + 1
    args[n] = P .. name
  end
  for at = 1, n, MOST do
    direct('DEL', unpack(args, at, math.min(n, at + MOST - 1)))
  end
  for name, members in pairs(indexes) do
    write_members('Z', name, members)
  end
  for name, members in pairs(sets) do
    write_members('S', name, members)
  end
  texts, gone, indexes, sets = {}, {}, {}, {}
end

-- Any command, at once and behind all that was said before.
local function call(...)
  flush()
  flushed = flushed + 1
  known, heads, sizes = {}, {}, {}
  return direct(...)
end

-- A command that reads one ZSET.
local function look(command, name, ...)
  write_index(name)
  return direct(command, P .. name, ...)
end

-- A STRING, or nil.
local function text(name)
  local found = texts[name]
  if found == nil then
    found = known[name]
    if found == nil then
      found = not gone[name] and direct('GET', P .. name)
      known[name] = found
    end
  end
  return found or nil
end

local function put_text(name, value)
  texts[name], gone[name], waits = value, nil, true
end

-- Delete keys, of any kind; of ZSETs only those for which nothing waits.
local function drop(...)
  for at = 1, select('#', ...) do
    local name = select(at, ...)
    texts[name], known[name], gone[name] = nil, nil, true
  end
  waits = true
end

-- The first member of a ZSET, or nil.
local function first(name)
  local found = heads[name]
  if found == nil then
    found = look('ZRANGE', name, 0, 0)[1] or false
    heads[name] = found
  end
  return found or nil
end

local function wait(of, name, member, there)
  local members = of[name]
  if not members then
    members = {}
    of[name] = members
  end
  members[member], waits = there, true
end

local function add(name, member)
  heads[name] = nil
  wait(indexes, name, member, true)
end

local function remove(name, member)
  heads[name] = nil
  wait(indexes, name, member, false)
end

-- How many members a SET has. Who joins one is new in it, and who parts from it is in it.
local function size(name)
  local found = sizes[name]
  if not found then
    if sets[name] then
      flush()
    end
    found = direct('SCARD', P .. name)
    sizes[name] = found
  end
  return found
end

local function join_set(name, member)
  wait(sets, name, member, true)
  sizes[name] = sizes[name] and sizes[name] + 1
end

local function part(name, member)
  wait(sets, name, member, false)
  sizes[name] = sizes[name] and sizes[name] - 1
end

-- -- counts -----------------------------------------------------------------------------------------------------------

-- A figure, read with all others once in a call and written with them at its end.
local function count(name)
  if not counts then
    local packed = direct('GET', P .. 'count')
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
    local packed = direct('GET', P .. name)
    found = packed and cmsgpack.unpack(packed)
    if found then
      names[found] = name
    end
    cache[name] = found
  end
  return found or nil
end

local function new_record(name, made)
  made = made or {}
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
  drop(names[rec])
  cache[names[rec]] = false
  dirty[rec] = nil
end

local function request(key)
  return record('r:' .. key)
end

local function conversation(number)
  return record('c:' .. number)
end

local function find(name)
  local number = text('name:' .. name)
  return number and conversation(number) or nil
end

-- -- registration -----------------------------------------------------------------------------------------------------

local RING = 64  -- answers kept of each life, one for each call: more than are ever under way

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

local stop, noted, changed, refused, news

-- Forget what was read, and what waits to be written.
local function reset()
  cache, names, dirty, lines, noted = {}, {}, {}, {}, {}
  texts, gone, indexes, sets, waits = {}, {}, {}, {}, false
  known, heads, sizes = {}, {}, {}
  counts, counted, stop = nil, false, nil
end

local function begin(keys, args)
  direct = redis.call
  P = keys[1] .. ':'
  ARGS = args
  R = caller(args[1])
  flushed, now, woke = 0, nil, false
  reset()
end

-- Tell one other life something. It is a hint: the store is the truth, and who misses it looks again later.
local function tell(life, what)
  if life and life ~= R.life then
    direct('PUBLISH', P .. 'to:' .. life, cmsgpack.pack(what))
  end
end

-- Tell the other lives that something may be done: each once until it asks for work.
local function tell_work()
  for _, life in ipairs(look('ZRANGE', 'lives', 0, -1)) do
    if life ~= R.life and direct('SADD', P .. 'woken', life) == 1 then
      tell(life, {kind = 'work'})
    end
  end
end

-- Whether this life may still be given work; one that was declared dead begins a new life first.
local function alive()
  if known.alive == nil then
    known.alive = look('ZSCORE', 'lives', R.life)
  end
  return known.alive
end

-- Whether another life has the namespace for itself.
local function stopped()
  if stop == nil then
    stop = direct('GET', P .. 'stop')
  end
  return stop and stop ~= R.life
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

-- -- changes ----------------------------------------------------------------------------------------------------------
--
-- `change` serves requests of any verbs, in order: what a daemon has to say in one moment comes in one call.
--
-- ARGV[2]  op: the call's number in its life; verbs: for each request its verb, and how many ARGV it has
-- ARGV[3]  the first request's arguments, its bytes, the next one's arguments ...; a verb sees its own as ARGV[2] and on
-- Answer   a list with one answer for each: a map, a list of a map and bytes, or an error
--
-- A request that fails in the interpreter changes nothing of the others: what waited with it is forgotten, and those before
-- it are served again, each written by itself.

local VERBS = {}

-- A verb that changes something. A body answers a map, and the bytes to go with it. A map with `error` wrote nothing, and
-- one with `existing` nothing that counts.
local function verb(name, body)
  VERBS[name] = body
end

-- Serve one request; its map, packed, and bytes. Its changes are written here with `alone`, and where some were already.
local function serve(one, args, alone)
  local name, at, before = one[1], one[2], flushed
  if name ~= 'open' and stopped() then
    return pack({error = 'stopped'})
  end
  A = cmsgpack.unpack(args[at])
  ARGS = {args[1], unpack(args, at, at + one[3] - 1)}
  woke = false
  if R.hand then
    now = nil
  end
  local map, bytes = VERBS[name]()
  if map.error then
    refused = true
  elseif not map.existing then
    changed, news = true, news or woke
    map.work = woke or nil
  end
  if name == 'open' then
    stop = nil
  end
  if alone or flushed > before then
    flush()
  end
  return pack(map), bytes
end

-- Serve all: their answers, and of each the map that is kept.
local function serve_all(requests, args)
  local answers, kept, failed = {}, {}, {}
  local at, from, alone = 1, 1, 0  -- which is served, the first whose changes wait, up to which each is written by itself
  while at <= #requests do
    local before = flushed
    if failed[at] then
      from = at + 1
    else
      local good, packed, bytes = pcall(serve, requests[at], args, at < alone)
      if good then
        answers[at], kept[at] = answer(packed, bytes), packed
        if at < alone or flushed > before then
          from = at + 1
        end
      else
        reset()
        answers[at] = type(packed) == 'table' and packed or redis.error_reply('ERR ' .. packed)
        kept[at], failed[at] = false, true
        if flushed == before and from < at then
          alone, at = at, from - 1
        else
          from = at + 1
        end
      end
    end
    at = at + 1
  end
  return answers, kept
end

-- Copies of a call: whichever comes first is served, and a later one is answered as that and changes nothing. The one that
-- was sent first may be the later one: a network that comes back delivers what was written to a connection that its daemon
-- gave up long ago. Bytes are not kept.
local function answered(ring, op, requests)
  local number = tonumber(direct('HGET', ring, 'op' .. op % RING) or 0)
  if number < op then
    return nil
  end
  local kept = number == op and cmsgpack.unpack(direct('HGET', ring, op % RING))
  local answers = {}
  for at = 1, #requests do
    if not kept then
      answers[at] = pack({error = 'late'})
    else
      answers[at] = kept[at] or redis.error_reply('ERR it failed when it was first served')
    end
  end
  return answers
end

redis.register_function(LIBRARY .. '_change', function(keys, args)
  begin(keys, args)
  changed, refused, news = false, false, false
  local said = cmsgpack.unpack(args[2])
  local ring, op, requests, at = P .. 'ops:' .. R.life, said.op, {}, 3
  for place = 1, #said.verbs, 2 do
    requests[#requests + 1] = {said.verbs[place], at, said.verbs[place + 1]}
    at = at + said.verbs[place + 1]
  end
  local before = answered(ring, op, requests)
  if before then
    return before
  end
  local answers, kept = serve_all(requests, args)
  flush()
  if news then
    tell_work()
  end
  -- Refusals are kept like all answers, but of a dead life, whose answers nobody would take away.
  if changed or (refused and alive()) then
    direct('HSET', ring, 'op' .. op % RING, string.format('%.0f', op), op % RING, cmsgpack.pack(kept))
  end
  return answers
end)

-- A verb that only reads.
local function read(name, body)
  redis.register_function({
    function_name = LIBRARY .. '_' .. name,
    callback = function(keys, args)
      begin(keys, args)
      A = cmsgpack.unpack(args[2])
      local map, bytes = body()
      return answer(pack(map), bytes)
    end,
    flags = {'no-writes'},
  })
end
