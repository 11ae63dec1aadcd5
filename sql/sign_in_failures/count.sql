-- Counts a wrong password; the tenth in a row and each after it blocks the address for 30 s,
-- doubling to an hour. An attempt that was under way when the block began counts no further.
-- $1 e-mail
insert into sign_in_failures as f (email, failures, last_failure_at)
values ($1, 1, clock_timestamp())
on conflict (email) do update
set failures = case when f.last_failure_at < clock_timestamp() - interval '24 hours'
                    then 1 else f.failures + 1 end,
    last_failure_at = clock_timestamp(),
    blocked_until = case when f.failures >= 9 and f.last_failure_at >= clock_timestamp() - interval '24 hours'
                         then clock_timestamp()
                              + least(30 * power(2, least(f.failures - 9, 7)), 3600) * interval '1 second'
                    end
where f.blocked_until is null or f.blocked_until <= clock_timestamp()
