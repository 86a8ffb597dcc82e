-- Who holds a conversation, who stands in its line, and how the lock passes on. The one place where locks change hands.

local function holds(rec)
  return conversation(rec.conversation).holder == rec.key
end

local function place(rec)
  return rec.rank .. rec.key
end

-- -- totals and states ------------------------------------------------------------------------------------------------

local function waiting_requests()
  return count('scheduled') + count('queued') + count('retrying') + count('parked')
end

-- Join a line, or leave it.
local function stand(rec, how)
  how('l:' .. rec.conversation, place(rec))
  lines[rec.conversation] = true
end

-- Put a record into the indexes that its values belong in, or take it out of them.
local function index(rec, put)
  local how = put and add or remove
  local key = rec.key
  if rec.external then
    if holds(rec) then
      how('locks', rec.ends .. key)
    else
      how('waiters', key)
      stand(rec, how)
      if rec.deadline then
        how('deadlines', rec.deadline .. key)
      end
    end
    return
  end
  local state = rec.state
  if state == 'running' then
    how('active', key)
    local move = put and join_set or part
    move('slots:' .. rec.slot, key)
    if rec.probe then
      move('probes:' .. rec.slot, key)
    end
    how('runs:' .. rec.life, key)
  elseif state == 'queued' then
    if not holds(rec) then
      stand(rec, how)
    end
  elseif state == 'scheduled' or state == 'retrying' or state == 'parked' then
    if rec.due then
      how('delayed', rec.due .. key)
    end
    if rec.asks then
      how('asking', key)
    elseif state == 'parked' then
      how('parked:' .. rec.route, rec.due .. key)
    end
  else
    how('finished', rec.finished .. key)
    if state == 'failed' then
      how('failed', rec.finished .. key)
    end
  end
  if rec.expires and (state == 'scheduled' or state == 'queued') then
    how('perish', rec.expires .. key)
  end
end

-- Bring a request into another state, by the table of `ksi.request`; `change` sets what goes with it.
local function become(rec, state, change)
  index(rec, false)
  if rec.state ~= state then
    if not string.find(TRANSITIONS[rec.state], ' ' .. state .. ' ', 1, true) then
      error('a request cannot go from ' .. rec.state .. ' to ' .. state)
    end
    set_count(rec.state, count(rec.state) - 1)
    set_count(state, count(state) + 1)
    set(rec, 'state', state)
  end
  if change then
    change()
  end
  index(rec, true)
end

-- -- lines ------------------------------------------------------------------------------------------------------------

local function head_of_line(conv)
  local head = (conv.lined or lines[conv.number]) and first('l:' .. conv.number)
  return head and request(string.sub(head, 21)) or nil
end

-- How many stand before (rank, key) in a line, or before a newcomer of that rank.
local function before(conv, rank, key)
  local line = 'l:' .. conv.number
  if key and first(line) == rank .. key then
    return 0
  end
  return math.min(look('ZLEXCOUNT', line, '-', '(' .. rank .. (key or ':')), R.position_limit)
end

local function holder_of(conv)
  return conv.holder and request(conv.holder) or nil
end

local function name_of(rec)
  return rec and rec.id or nil
end

-- Make `rec` its conversation's holder under a new fence; who held it already keeps `since`.
local function hold(rec)
  local conv = conversation(rec.conversation)
  if conv.holder ~= rec.key then
    if not conv.holder then
      add('held', conv.number)
    end
    set(conv, 'holder', rec.key)
    set(conv, 'since', A.wall)
  end
  set(rec, 'fence', next_number('fence'))
end

local function let_go(conv)
  set(conv, 'holder', nil)
  remove('held', conv.number)
end

-- Begin a held lock's time anew; only the store's own time ends it.
local function renew_time(rec)
  index(rec, false)
  set(rec, 'ends', pad20(time() + R.lock_expiry))
  set(rec, 'expires_at', tonumber(A.wall) + R.lock_expiry)
  index(rec, true)
  return {
    request_id = rec.id,
    conversation = conversation(rec.conversation).name,
    fence = tonumber(rec.fence),
    expires_at = tonumber(rec.expires_at),
  }
end

-- Keep a conversation's own entries: what of it can run now, and whether nothing keeps it.
local function reindex(conv)
  local ready = holder_of(conv) or head_of_line(conv)
  local entry, route
  if ready and not ready.external and ready.state == 'queued' then
    entry, route = place(ready), ready.route
  end
  if conv.ready ~= entry or conv.ready_route ~= route then
    if conv.ready then
      unready(conv)
    end
    if entry then
      make_ready(conv, entry, route, home_of(conv, route))
    end
    set(conv, 'ready', entry)
    set(conv, 'ready_route', route)
  end
  local idle
  if (conv.members or '0') == '0' and (conv.children or '0') == '0' and not conv.reminding then
    idle = conv.active .. conv.number
  end
  if conv.idle ~= idle then
    if conv.idle then
      remove('idle', conv.idle)
    end
    if idle then
      add('idle', idle)
    end
    set(conv, 'idle', idle)
  end
  if not lines[conv.number] then
    return
  end
  lines[conv.number] = nil
  if first('l:' .. conv.number) then
    if not conv.lined then
      add('lined', conv.number)
      set(conv, 'lined', '1')
    end
  elseif conv.lined then
    remove('lined', conv.number)
    set(conv, 'lined', nil)
  end
end

-- After any change of holder or line: let an external head in, and keep what is ready. Answers a grant, if there is one.
local function refresh(conv)
  local grant
  if not conv.holder then
    set(conv, 'since', nil)
    local head = head_of_line(conv)
    if head and head.external then
      index(head, false)
      hold(head)
      set(head, 'ends', pad20(time()))
      index(head, true)
      grant = renew_time(head)
      tell(head.life, {kind = 'granted', name = head.id, grant = grant})
    end
  end
  reindex(conv)
  return grant
end

-- -- passing on -------------------------------------------------------------------------------------------------------

-- After `rec` let its conversation go.
local function pass_on(rec)
  local conv = conversation(rec.conversation)
  local granted = refresh(conv)
  local following = granted and holder_of(conv) or head_of_line(conv)
  return {conversation = conv.name, released_by = rec.id, next_request = name_of(following), granted = granted}
end

-- After `rec` left the line without having held: an external waiter behind it may come in.
local function step_out(rec)
  local conv = conversation(rec.conversation)
  local granted = refresh(conv)
  if granted then
    return {conversation = conv.name, released_by = rec.id, next_request = granted.request_id, granted = granted}
  end
end

-- Bring a request to a final state, and its lock or its place to the next. `block`: why its chain has no place for it;
-- `routed`: its aftermath came with its end. Answers a passing, and what became of the delivery that it carried.
local function finish(rec, state, err, message, block, routed)
  local conv = conversation(rec.conversation)
  local held = conv.holder == rec.key
  set(conv, 'active', A.wall)
  become(rec, state, function()
    set(rec, 'error', err)
    set(rec, 'message', message)
    set(rec, 'finished', A.wall)
    set(rec, 'due', nil)
    set(rec, 'demand', nil)
    set(rec, 'asks', nil)
    if held then
      let_go(conv)
    end
    leave(rec, block, routed)
  end)
  for life in string.gmatch(rec.watchers or '', '%S+') do
    tell(life, {kind = 'ended', name = rec.id})
  end
  local passing
  if held then
    passing = pass_on(rec)
  else
    passing = step_out(rec)
  end
  return passing, carried(rec)
end

-- Forget an external holder or waiter.
local function drop_lock(rec)
  local conv = conversation(rec.conversation)
  index(rec, false)
  remove('ext:' .. rec.life, rec.key)
  if conv.holder == rec.key then
    let_go(conv)
  end
  drop('id:' .. rec.id)
  forget_record(rec)
  set(conv, 'members', tonumber(conv.members) - 1)
end

-- Take an external holder or waiter away, whoever asks for it.
local function take_away(rec)
  local held = holds(rec)
  set(conversation(rec.conversation), 'active', A.wall)
  drop_lock(rec)
  if held then
    return pass_on(rec)
  end
  return step_out(rec)
end

-- -- conversations ----------------------------------------------------------------------------------------------------

local function record_fork(conv, parent, child, request_id, kind)
  local number = key16(next_number('fork'))
  local fork = {parent = parent, child = child, request_id = request_id, at = tonumber(A.wall), kind = kind}
  put_text('f:' .. number, cmsgpack.pack(fork))
  add('forks', number)
  add('tree:' .. conv.root, number)
  direct('SADD', P .. 'cf:' .. conv.number, number)
  return fork
end

-- A conversation by its name; begun where it is new, at the head of `fork_of` if that is given.
local function conversation_named(name, fork_of, request_id)
  local conv = find(name)
  if conv then
    return conv
  end
  local number = key16(next_number('conversation'))
  conv = new_record('c:' .. number)
  conv.number = number
  set(conv, 'name', name)
  set(conv, 'created', A.wall)
  set(conv, 'active', A.wall)
  set(conv, 'members', '0')
  set(conv, 'turns', '0')
  put_text('name:' .. name, number)
  add('sessions', number)
  local parent = fork_of and find(fork_of)
  set(conv, 'root', parent and parent.root or number)
  if parent then
    set(conv, 'parent', parent.number)
    set(conv, 'head', parent.head)
    set(conv, 'head_session', parent.head_session)
    set(conv, 'context', parent.context)
    set(conv, 'node', parent.node)
    set(conv, 'keeper', parent.keeper)
    set(conv, 'logger', parent.logger)
    set(parent, 'children', (tonumber(parent.children) or 0) + 1)
    record_fork(conv, parent.name, name, request_id, 'requested')
    reindex(parent)
  end
  return conv
end

-- Keep every route there ever was, and tell the others of one that is new.
local function note_route(route)
  if noted[route] then
    return
  end
  noted[route] = true
  if direct('ZADD', P .. 'routes', 0, route) == 1 then
    for _, life in ipairs(look('ZRANGE', 'lives', 0, -1)) do
      tell(life, {kind = 'route', name = route})
    end
  end
end

-- -- attempts ---------------------------------------------------------------------------------------------------------

local function trail_entry(kind, number, attempt)
  return kind .. string.format('%08.0f', number) .. attempt
end

-- Put an ended attempt into its request's trail and into the account. `spent` has no text. A request that its first
-- attempt completed has no trail of its own, but `at_once`.
local function account(rec, entry, at, flag, spent)
  if entry then
    call('RPUSH', P .. 'a:' .. rec.key, entry)
  end
  add('account', at .. key16(next_number('account')) .. flag .. spent)
end
