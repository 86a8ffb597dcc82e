-- free, nodes: which machines are there, and what only one machine's daemons may start.
--
-- A provider session can live on a machine: `node` of its conversation, kept by the provider `keeper`. What goes on in it
-- becomes ready in a lane of its own, `ready:<route>\n<node>`, of which only daemons of that machine take. A lane stands in
-- `routes` while something is in it (one of what was set aside stays there), and `bound` of the count is how much is in all lanes: where it is 0, nobody looks.
-- Machines are in `heard` by when they were last heard of. One that is silent for too long goes to `lost`, and what is in
-- its lanes is let go in steps; `freeing` are those for which that is not done yet. What was let go stays free.
--
-- ARGV[2]  free: limit; bring_back: paused, lane, entry, limit
-- Answer   more: whether to call again; heard, lost: lists of names and times; after: where to go on

local FORGET = 30 * 86400 * 1000000  -- how long a lost machine is shown, in microseconds

local ASIDE = '\1'  -- stands for a machine: nobody's, for what is paused and was set aside
local OVER = '\2'  -- likewise, for what waits for a budget

local function is_machine(node)
  return node and node ~= ASIDE and node ~= OVER
end

-- Whether a request of these is not to be started now.
local function is_paused(agent, conversation_name, priority)
  local paused = A.paused
  return paused and (paused.conversations[conversation_name] or paused.priorities[tostring(priority)]
    or agent and paused.agents[agent]) or false
end

local function lane(route, node)
  return node and route .. '\n' .. node or route
end

-- Whether a provider is a step of a route; see `ksi.store.binding`.
local function serves(route, provider)
  for word in string.gmatch(route, '[^,]+') do
    if string.match(word, '^~?([^=]*)') == provider then
      return true
    end
  end
  return false
end

-- The machine whose daemons alone may start a conversation's request of this route now; nil: any may.
local function home_of(conv, route)
  if conv.node and serves(route, conv.keeper) and look('ZSCORE', 'heard', conv.node) then
    return conv.node
  end
end

-- Take a conversation's ready entry out of its lane.
local function unready(conv)
  local name = lane(conv.ready_route, conv.ready_node)
  remove('ready:' .. name, (conv.ready_before or '') .. conv.ready)
  if conv.over_line then
    remove('bw:' .. conv.over_line, conv.ready)
    remove('ends_over', conv.over_end .. conv.number)
    if not first('bw:' .. conv.over_line) then
      remove('lines_over', conv.over_line)
    end
    set(conv, 'over_line', nil)
    set(conv, 'over_end', nil)
  end
  if is_machine(conv.ready_node) then
    set_count('bound', count('bound') - 1)
    if not first('ready:' .. name) then
      remove('routes', name)
    end
  end
  set(conv, 'ready_node', nil)
end

-- Put a conversation's next request where it can be taken: by any machine's daemons, or by those of one.
local function make_ready(conv, entry, route, node)
  local name = lane(route, node)
  local before = turns.before(request(key_in(entry)))
  add('ready:' .. name, before .. entry)
  set(conv, 'ready_before', before ~= '' and before or nil)
  if node then
    add('routes', name)
  end
  if is_machine(node) then
    set_count('bound', count('bound') + 1)
  end
  set(conv, 'ready_node', node)
  woke = woke or (node ~= ASIDE and node ~= OVER)
end

-- This machine gives a sign of life.
local function hear()
  if call('ZADD', P .. 'heard', time(), R.node) == 1 then
    remove('lost', R.node)
    call('SREM', P .. 'freeing', R.node)
  end
end

local function lose_silent()
  local silent = string.format('%.0f', time() - R.node_timeout)
  local found = call('ZRANGEBYSCORE', P .. 'heard', '-inf', silent, 'WITHSCORES')
  for at = 1, #found, 2 do
    remove('heard', found[at])
    call('ZADD', P .. 'lost', found[at + 1], found[at])
    call('SADD', P .. 'freeing', found[at])
  end
  if #found > 0 then
    call('ZREMRANGEBYSCORE', P .. 'lost', '-inf', string.format('%.0f', time() - FORGET))
  end
end

-- Let one lane's next requests go to all, at most `limit`; how many there were.
local function free_lane(name, limit)
  local entries = call('ZRANGE', P .. 'ready:' .. name, 0, limit - 1)
  for _, entry in ipairs(entries) do
    local conv = conversation(request(key_in(entry)).conversation)
    unready(conv)
    make_ready(conv, conv.ready, conv.ready_route, nil)
  end
  return #entries
end

verb('free', function()
  local node, left = call('SRANDMEMBER', P .. 'freeing'), A.limit
  local tail = node and '\n' .. node
  for _, name in ipairs(node and call('ZRANGE', P .. 'routes', 0, -1) or {}) do
    if left > 0 and string.sub(name, -#tail) == tail then
      left = left - free_lane(name, left)
    end
  end
  if node and left > 0 then
    call('SREM', P .. 'freeing', node)
  end
  return {more = call('SCARD', P .. 'freeing') > 0}
end)

-- Look through what was set aside, and let what is not paused any more be taken again.
verb('bring_back', function()
  local left = A.limit
  for _, name in ipairs(call('ZRANGE', P .. 'routes', 0, -1)) do
    if string.sub(name, -2) == '\n' .. ASIDE and name >= A.lane then
      local behind = name == A.lane and '(' .. A.entry or '-'
      local entries = call('ZRANGEBYLEX', P .. 'ready:' .. name, behind, '+', 'LIMIT', 0, left)
      for _, entry in ipairs(entries) do
        local rec = request(key_in(entry))
        local conv = conversation(rec.conversation)
        if not is_paused(rec.agent, conv.name, rec.priority) then
          unready(conv)
          make_ready(conv, conv.ready, conv.ready_route, home_of(conv, conv.ready_route))
        end
      end
      left = left - #entries
      if left == 0 then
        return {after = name .. '\n' .. entries[#entries]}
      end
    end
  end
  return {}
end)

read('nodes', function()
  local map = {}
  for _, name in ipairs({'heard', 'lost'}) do
    local list, found = {}, call('ZRANGE', P .. name, 0, -1, 'WITHSCORES')
    for at = 1, #found, 2 do
      list[#list + 1] = {found[at], tonumber(found[at + 1])}
    end
    map[name] = list
  end
  return map
end)
