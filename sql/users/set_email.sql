-- Sets the address of a user and marks it as verified. No row if the password or the address was changed
-- meanwhile.
-- $1 user id, $2 the present address, $3 the hash that the token is bound to, $4 the verified address
update users
set email = $4, email_verified = true,
    updated_at = greatest(clock_timestamp(), updated_at + interval '1 microsecond')
where id = $1 and email = $2 and password_hash = $3
returning id
