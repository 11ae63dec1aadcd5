-- Reads the revocations since the previous read. The cursor is the oldest transaction that was open
-- then: every transaction below it was visible or rolled back, so no revocation is missed, even if
-- it commits late, but some may be returned twice. The first read returns all rows, as does the
-- first one after the server restarted or failed over, because its transaction ids may be lower.
-- Rows restored from a dump may have ids above any transaction of this server; only a full read
-- returns them.
-- $1 the cursor of the previous read, $2 the start time of its server; both null for the first read
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
