# One static binary and no shell: docs/docker.md says how to use it.
#   docker build -t valetkey .
FROM rust:1-alpine AS build
# aws-lc-rs and jemalloc compile C, as .cargo/config.toml says; musl is what a binary without an interpreter links. Versions are those of the image's Alpine.
# hadolint ignore=DL3018
RUN apk add --no-cache build-base cmake perl
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry --mount=type=cache,target=/src/target \
    cargo build --release --locked && install -D target/release/valetkey /out/valetkey
# Folders with their owner, which a volume takes over when it is empty.
RUN install -d -o 65532 -g 65532 -m 0700 /out/data /out/codex

FROM alpine:3 AS roots
# hadolint ignore=DL3018
RUN apk add --no-cache ca-certificates

FROM scratch
COPY --from=roots /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build --chown=65532:65532 /out/data /data
COPY --from=build --chown=65532:65532 /out/codex /codex
COPY --from=build /out/valetkey /valetkey
ENV HOME=/data CODEX_HOME=/codex
USER 65532:65532
EXPOSE 8377
HEALTHCHECK --interval=30s --timeout=6s --start-period=10s --retries=3 CMD ["/valetkey", "health"]
ENTRYPOINT ["/valetkey"]
CMD ["serve"]
