-- Counts the tasks of a list over all its pages. The case expression lets a generic plan answer the
-- unfiltered count from the index alone.
-- $1 user id, $2 completed or null for all, $3 text to search for or null
select case
    when $2::boolean is null and $3::text is null
    then (select count(*) from tasks where user_id = $1)
    else (select count(*) from tasks
          where user_id = $1
            and ($2 is null or completed = $2)
            and ($3 is null
                 or strpos(fold_case(title), fold_case($3)) > 0
                 or strpos(fold_case(description), fold_case($3)) > 0))
    end as total
