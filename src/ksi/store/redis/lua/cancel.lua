-- cancel: stop a request that is not final; external holders and waiters are taken away.
--
-- ARGV[2]  request_id by wall lock_expiry position_limit
-- Answer   the fields of `Cancelled`

verb('cancel', function()
  local key = call('GET', P .. 'id:' .. A.request_id)
  if not key then
    return {error = 'unknown'}
  end
  local rec = request(key)
  local map = {request_id = rec.id, conversation = conversation(rec.conversation).name, outcome = 'cancelled'}
  if rec.external then
    tell_gone(rec, holds(rec))
    map.passing = take_away(rec)
    map.state = 'cancelled'
    return map
  end
  if FINAL[rec.state] then
    map.outcome = 'already_final'
  else
    set(rec, 'interrupted_by', rec.interrupted_by or A.by)
    if rec.state == 'running' then
      map.outcome = 'stopping'
      set(rec, 'cancelling', '1')
      watch(rec)
      tell(rec.life, {kind = 'stop', name = rec.id})
    else
      map.passing, map.injections = finish(rec, 'cancelled', 'cancelled')
    end
  end
  map.state = rec.state
  return map
end)
