-- Deletes an account, by cascade its tasks, keys and sessions (whose revocations a trigger
-- writes); no row if the password was changed meanwhile.
-- $1 user id, $2 the hash that was verified
with person as (
    delete from users where id = $1 and password_hash = $2 returning id, email
), cleared as (
    delete from sign_in_failures where email = (select email from person)
)
select (select coalesce(array_agg(s.id), '{}') from sessions s where s.user_id = $1) as session_ids
from person
