-- What several statements do alike. A volatile function takes its snapshot when it is called. The callers
-- have locked the account by then, so the functions see the sessions of all previous logins.

-- Ends every session of an account except `keep`, and returns them.
create function end_other_sessions(account uuid, keep uuid) returns uuid[]
language sql volatile as $$
    with ended as (
        delete from sessions where user_id = account and id is distinct from keep returning id
    )
    select coalesce(array_agg(id), '{}') from ended
$$;

-- Records that an account was used from a network, at most once an hour. Forgets the networks beyond a
-- hundred, the least recently used first.
create function record_network(account uuid, client_network text) returns void
language plpgsql as $$
begin
    if exists (
        select from login_networks
        where user_id = account and network = client_network
          and last_used_at > clock_timestamp() - interval '1 hour'
    ) then
        return;
    end if;
    insert into login_networks (user_id, network, last_used_at)
    values (account, client_network, clock_timestamp())
    on conflict (user_id, network) do update set last_used_at = excluded.last_used_at;
    delete from login_networks
    where user_id = account and network in (
        select network from login_networks
        where user_id = account
        order by last_used_at desc
        offset 100);
end
$$;
