-- open, renew, recover, close: which daemons serve, and what becomes of what a dead one left.
--
-- A daemon's life is a number. While its lease runs, its runs are its own. A life that is over is put into `dead`, and
-- what it was answerable for is recovered in steps by whoever comes by.
--
-- ARGV[2]  open: daemon node layout; renew: fence, sweep; recover: limit max_interruptions fail_interrupted; lease, wall,
--          lock_expiry, position_limit

local function declare_dead(life)
  if call('ZREM', P .. 'lives', life) == 1 then
    call('SADD', P .. 'dead', life)
  end
end

-- Put back, or end, what ran when its daemon died.
local function recover_run(rec, map)
  local interruptions = (tonumber(rec.interruptions) or 0) + 1
  set(rec, 'interruptions', interruptions)
  local body = cjson.decode(passages.body(rec.key))
  local mcp = body.mcp_config
  local attempt = {
    number = tonumber(rec.attempt),
    provider = rec.provider,
    outcome = 'interrupted',
    started_at = tonumber(rec.started),
    finished_at = tonumber(A.wall),
    asked = rec.model,
    mcp = (type(mcp) == 'string' and mcp ~= '') or (type(mcp) == 'table' and next(mcp) ~= nil),
    error = 'daemon_restart',
  }
  local spent = {
    key = tonumber(rec.key),
    conversation = conversation(rec.conversation).name,
    agent_id = rec.agent,
    first = false,
    attempt = attempt,
  }
  account(rec, trail_entry('I', attempt.number, cmsgpack.pack(attempt)), A.wall, 'B', cmsgpack.pack(spent))
  charge(rec, nil, 0)
  budgets.interrupted(rec)
  put_reminders_back(rec, conversation(rec.conversation))
  if rec.cancelling then
    table.insert(map.ended, ended(rec, 'cancelled', 'cancelled'))
  elseif R.fail_interrupted or interruptions >= R.max_interruptions then
    table.insert(map.ended, ended(rec, 'failed', 'daemon_restart'))
  else
    become(rec, 'queued')
    refresh(conversation(rec.conversation))
    table.insert(map.requeued, rec.id)
  end
end

-- Waiters without a deadline were tied to a connection that died; the others, and locks, begin their time anew.
local function recover_external(rec)
  if not holds(rec) and not rec.patience then
    tell_gone(rec, false)
    return take_away(rec)
  end
  remove('ext:' .. rec.life, rec.key)
  set(rec, 'life', R.life)
  add('ext:' .. R.life, rec.key)
  if holds(rec) then
    renew_time(rec)
  else
    index(rec, false)
    set(rec, 'deadline', pad20(time() + tonumber(rec.patience)))
    index(rec, true)
  end
end

-- Whether a daemon serves beside the one whose life was `before`.
local function others_serve(before)
  for _, life in ipairs(look('ZRANGEBYSCORE', 'lives', time(), '+inf')) do
    if life ~= before then
      return true
    end
  end
  return false
end

verb('open', function()
  local layout = tonumber(call('HGET', P .. 'meta', 'layout'))
  local before = call('HGET', P .. 'daemons', R.daemon)
  -- What an older layout wrote is read as it is; but its daemons must be gone, for they cannot read what comes now.
  if layout and (layout > A.layout or (layout < A.layout and others_serve(before))) then
    return {error = 'layout', found = layout}
  end
  local alone = call('GET', P .. 'stop')
  if alone and alone ~= R.life and alone ~= before then
    return {error = 'stopped'}
  end
  call('DEL', P .. 'stop')
  if call('HEXISTS', P .. 'meta', 'loading') == 1 then
    call('SET', P .. 'stop', R.life, 'PX', 60000)
    return {error = 'half_loaded'}
  end
  call('HSET', P .. 'meta', 'layout', A.layout)
  if before then
    declare_dead(before)
  end
  call('HSET', P .. 'daemons', R.daemon, R.life)
  call('HSET', P .. 'life:' .. R.life, 'daemon', R.daemon, 'node', R.node)
  call('ZADD', P .. 'lives', time() + R.lease, R.life)
  hear()
  call('HSET', P .. 'seen', R.daemon, A.wall)
  woke = #call('ZRANGE', P .. 'active', 0, 0) > 0
  return {before = before or nil}
end)

verb('recover', function()
  local map = {requeued = {}, ended = {}, more = false}
  local life = A.of or call('SRANDMEMBER', P .. 'dead')
  if not life then
    return map
  end
  local left = A.limit
  for _, name in ipairs({'ext:', 'runs:'}) do
    for _, key in ipairs(call('ZRANGE', P .. name .. life, 0, left - 1)) do
      left = left - 1
      local rec = request(key)
      if name == 'ext:' then
        recover_external(rec)
      else
        recover_run(rec, map)
      end
    end
  end
  map.done = call('EXISTS', P .. 'ext:' .. life, P .. 'runs:' .. life) == 0
  if map.done then
    call('SREM', P .. 'dead', life)
    call('SREM', P .. 'woken', life)
    call('DEL', P .. 'ops:' .. life, P .. 'life:' .. life)
  end
  map.more = call('SCARD', P .. 'dead') > 0
  return map
end)

-- Begin this life's lease anew; false where the life was declared dead. A life whose own lease had lapsed when it renews
-- was not dead but asleep, or the server was away: all others get the time to come back before anybody is declared dead.
local function extend_lease()
  local lease = call('ZSCORE', P .. 'lives', R.life)
  if not lease then
    return false
  end
  if tonumber(lease) < time() then
    call('HSET', P .. 'meta', 'patience', pad20(time() + R.lease))
  end
  call('ZADD', P .. 'lives', time() + R.lease, R.life)
  hear()
  return true
end

-- The lease alone, said by a daemon whose event loop is held. It comes over a connection of its own, has no number among
-- the daemon's calls, and brings nobody back to life. Answers 1 where the lease was extended.
redis.register_function(LIBRARY .. '_keep', function(keys, args)
  begin(keys, args)
  if stopped() or not extend_lease() then
    return 0
  end
  flush()
  return 1
end)

verb('renew', function()
  if not extend_lease() then
    return {error = 'dead_life'}
  end
  call('HSET', P .. 'seen', R.daemon, A.wall)
  if count('fence') < A.fence then
    -- The server lost what it had acknowledged (a failover): fences never go back.
    set_count('fence', A.fence + 1000000)
  end
  if pad20(time()) >= (call('HGET', P .. 'meta', 'patience') or '') then
    for _, life in ipairs(call('ZRANGEBYSCORE', P .. 'lives', '-inf', '(' .. string.format('%.0f', time()))) do
      declare_dead(life)
    end
    lose_silent()
  end
  return {dead = call('SCARD', P .. 'dead'), freeing = call('SCARD', P .. 'freeing')}
end)

verb('close', function()
  call('ZREM', P .. 'lives', R.life)
  call('SADD', P .. 'dead', R.life)
  return {}
end)
