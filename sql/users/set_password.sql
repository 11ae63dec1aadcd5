-- Replaces the hash that was verified and forgets the wrong attempts; no row if the password was
-- changed meanwhile.
-- $1 user id, $2 the hash that was verified, $3 the new hash
with person as (
    update users
    set password_hash = $3,
        updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')
    where id = $1 and password_hash = $2
    returning id, email, created_at, updated_at
), cleared as (
    delete from sign_in_failures where email = (select email from person)
)
select id, email, created_at, updated_at from person
