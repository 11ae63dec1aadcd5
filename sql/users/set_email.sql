-- Sets the address of a user and marks it as verified. If it is another address, ends every session except
-- one, because the access tokens of the others contain the earlier address. No row if the password or the
-- address was changed meanwhile.
-- $1 user id, $2 the present address, $3 the hash that the token is bound to, $4 the verified address, $5 the
-- session to keep or null
update users
set email = $4, email_verified = true,
    updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')
where id = $1 and email = $2 and password_hash = $3
returning case when $4 <> $2 then end_other_sessions(id, $5) else '{}' end as ended_ids
