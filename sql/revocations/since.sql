-- What was revoked since the previous read. The cursor is the oldest transaction that was still
-- open then: everything below it was visible or rolled back, so nothing is missed however late a
-- transaction commits; what was visible already may come again. The first read, and the first one
-- of a server that was started or failed over since, whose transaction numbers may be lower, reads
-- all rows. Rows out of a dump may have higher numbers than any transaction here: they are read
-- then, and not again and again.
-- $1 the cursor of the previous read, $2 when its server had started; null for the first time
with server as (
    select pg_postmaster_start_time() as server_started_at,
           pg_snapshot_xmin(pg_current_snapshot())::text::bigint as cursor
)
select r.session_id, r.before_epoch, s.server_started_at, s.cursor
from revocations r cross join server s
where r.xid >= case when pg_postmaster_start_time() = $2 then $1::bigint::text::xid8 else '0' end
  and r.xid < case when pg_postmaster_start_time() = $2
                   then pg_snapshot_xmax(pg_current_snapshot()) else '18446744073709551615' end
union all
select null, null, server_started_at, cursor from server
