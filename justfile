# The menu. Anything with an `if` in it lives in `xtask/`.

# list these lines
default:
    @just --list

# fetch, train, judge and report: the ten-minute tour
demo:
    cargo run --release -- demo

# everything CI runs
test:
    cargo xtask test

# formatting, lints and the house rules, without the tests
lint:
    cargo xtask test --only lint

# the house rules alone
tidy:
    cargo xtask tidy

# reformat
fmt:
    cargo fmt

# Bantam beside PEFT, transformers and llama.cpp (slow; see `cargo xtask peers --help`)
peers what="all":
    cargo xtask peers {{what}}

# write a two-layer chat model and rows to try commands on
tiny dir="target/tiny":
    cargo xtask tiny {{dir}}

# make the PyTorch goldens again
goldens:
    cargo xtask goldens

# licences, advisories and sources of the dependencies (needs cargo-deny)
deny:
    cargo deny check
