-- Stores a registration until its address is verified. Replaces an earlier one of the address, whose
-- links then no longer work. Also stores it if there is an account, so that the work is the same.
-- $1 user id, $2 e-mail address, $3 password hash
insert into pending_registrations (id, email, password_hash, registered_at)
values ($1, $2, $3, clock_timestamp())
on conflict (email) do update
set id = excluded.id, password_hash = excluded.password_hash, registered_at = excluded.registered_at
