-- acquire, renew_lock, release, withdraw: what outside holders do with a conversation's lock.
--
-- ARGV[2]  request_id; acquire: conversation rank priority wait deadline (patience in microseconds) metadata;
--          renew_lock, release: fence; wall, lock_expiry, position_limit, max_queued
-- Answer   the fields of `Acquired`, `LockGrant`, `Passing`

local function known(id)
  local key = call('GET', P .. 'id:' .. id)
  return key and request(key) or nil
end

local function adopt(rec)
  if rec.life ~= R.life then
    remove('ext:' .. rec.life, rec.key)
    set(rec, 'life', R.life)
    add('ext:' .. rec.life, rec.key)
  end
end

local function acquire_again(rec)
  if not rec.external then
    return {error = 'request_id'}
  end
  local conv = find(A.conversation)
  if not conv or conv.number ~= rec.conversation then
    return {error = 'other_lock'}
  end
  if conv.holder == rec.key then
    set(conv, 'active', A.wall)
    adopt(rec)
    return {grant = renew_time(rec), renewed = true}
  end
  return {queued = true, position = before(conv, rec.rank, rec.key), holder = name_of(holder_of(conv))}
end

verb('acquire', function()
  local rec = known(A.request_id)
  if rec then
    return acquire_again(rec)
  end
  local conv = find(A.conversation)
  local holder = conv and holder_of(conv)
  local head = conv and head_of_line(conv)
  local free = not holder and (not head or A.rank < head.rank)
  if conv and not free and not A.wait then
    return {position = before(conv, A.rank), holder = name_of(holder)}
  end
  if not free and call('ZCARD', P .. 'waiters') >= R.max_queued then
    return {error = 'waiters_full'}
  end

  conv = conversation_named(A.conversation)
  set(conv, 'active', A.wall)
  local key = key16(next_number('member'))
  rec = new_record('r:' .. key)
  rec.key = key
  set(rec, 'external', '1')
  set(rec, 'id', A.request_id)
  set(rec, 'conversation', conv.number)
  set(rec, 'rank', A.rank)
  set(rec, 'priority', A.priority)
  set(rec, 'enqueued', A.wall)
  set(rec, 'metadata', A.metadata)
  set(rec, 'patience', A.patience)
  set(rec, 'deadline', A.patience and pad20(time() + tonumber(A.patience)) or nil)
  set(rec, 'life', R.life)
  set(conv, 'members', tonumber(conv.members) + 1)
  call('SET', P .. 'id:' .. A.request_id, key)
  add('ext:' .. R.life, key)
  index(rec, true)
  local grant = refresh(conv)
  if grant then
    return {grant = grant}
  end
  return {queued = true, position = before(conv, rec.rank, rec.key), holder = name_of(holder)}
end)

-- The lock that an id holds; or nothing, and why not.
local function held_lock()
  local rec = known(A.request_id)
  if rec and not rec.external then
    return nil, {error = 'request_id'}
  end
  if not rec or not holds(rec) then
    return nil, {error = 'no_lock'}
  end
  if A.fence and tonumber(rec.fence) ~= A.fence then
    return nil, {error = 'other_fence'}
  end
  return rec
end

verb('renew_lock', function()
  local rec, refusal = held_lock()
  if not rec then
    return refusal
  end
  set(conversation(rec.conversation), 'active', A.wall)
  adopt(rec)
  return renew_time(rec)
end)

verb('release', function()
  local rec, refusal = held_lock()
  if not rec then
    return refusal
  end
  return take_away(rec)
end)

verb('withdraw', function()
  local rec = known(A.request_id)
  if not rec or not rec.external or holds(rec) then
    return {}
  end
  return {passing = take_away(rec)}
end)
