# What CI runs, and nothing else.
check:
    .ci/run

test *ARGS:
    cargo nextest run {{ARGS}}

fmt:
    cargo fmt

doc:
    cargo doc --no-deps --open

run *ARGS:
    cargo run -- {{ARGS}}

bench *ARGS:
    cargo bench --bench end_to_end -- {{ARGS}}

# Makes target/pgo/valetkey: guided by a profile, ten minutes.
release:
    benches/pgo/run
