-- Converts a text to the form that searches compare. Searches ignore case in every script, but the
-- database's own locale may support only ASCII. Lower case alone is not enough: ICU lowercases a
-- sigma at the end of a word differently, so a search for the first letters of a word could fail.
do $$
declare
    candidate text;
    works boolean;
    rules text := '';
begin
    -- PostgreSQL's own rules (17 or later), else ICU's, else those of a locale of the operating
    -- system that is not Azerbaijani, Lithuanian or Turkish, else the database's own locale. In the
    -- last case the service logs a warning at startup if they are not sufficient.
    for candidate in
        select format(' collate pg_catalog.%I', collname)
        from pg_collation
        where collnamespace = 'pg_catalog'::regnamespace
          and collencoding in (-1, pg_char_to_encoding('UTF8'))
          and (collname in ('pg_c_utf8', 'und-x-icu') or collprovider = 'c')
          and collname !~ '^(az|lt|tr)'
        order by array_position(array['pg_c_utf8', 'und-x-icu', 'C.utf8', 'en_US.utf8']::name[], collname),
                 collname
    loop
        begin
            execute format('select upper(lower(%L%s)) = %L', 'äбσς', candidate, 'ÄБΣΣ') into works;
            if works then
                rules := candidate;
                exit;
            end if;
        exception when others then
            -- The operating system no longer has this locale.
            null;
        end;
    end loop;
    execute format('create or replace function fold_case(text) returns text language sql immutable parallel safe as %L',
                   format('select upper(lower($1%s))', rules));
end
$$;
