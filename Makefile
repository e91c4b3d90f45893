# `make` prints this help. The README's two commands are `make demo` and
# `make test`; `make check` is what CI runs, no more and no less.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
CACHE       := $(CURDIR)/.cache
BIN         := $(CURDIR)/bin
# As many inputs of the fuzzer's as take three to five seconds on two cores; of a
# target that is not here 10000x.
INPUTS      := config:FuzzLoad=2500x certs:FuzzParseName=6000x packet:FuzzReader=12000x packet:FuzzPrefix=28000x \
	sniff:FuzzParseHello=20000x federation:FuzzFeed=6000x federation:FuzzEntry=5500x federation:FuzzQuery=13000x \
	federation/state:FuzzLoad=60000x federation/state:FuzzWith=80000x
FUZZTIME    ?=
HANG        ?= 5m
BENCHTIME   ?= 1s
# Packages that have benchmarks: the others would be built and linked for nothing.
BENCHED      = $$(grep -rlE --include='*_test.go' --exclude-dir=wanfed '^func Benchmark' . | xargs dirname | sort -u)
# Benchmarks that take minutes each.
MANY        := Peers/(500|1000)
ROUNDS      ?= 5
WATCH       ?= 5m
RUNS        ?= 3
JOINS       ?= 9
GO          ?= go
# The race detector needs a C compiler. Where there is none tests run without
# it, and say so; `make check` insists.
RACE        ?= $(if $(shell command -v $${CC:-cc}),-race)
RUNFLAGS    ?=
SUMMARY     := $(CACHE)/end-to-end.txt

.PHONY: help
help: ## Print this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

.PHONY: build
build: ## Build bin/culvert
	@CGO_ENABLED=0 $(GO) build -trimpath -o $(BIN)/culvert ./cmd/culvert

.PHONY: serf
serf: ## Build the upstream serf agent that the demo and the tests use
	@$(GO) -C test/servers build -o $(CACHE)/bin/serf github.com/hashicorp/serf/cmd/serf

.PHONY: demo
demo: build serf $(if $(FEDERATION),e2e-tools) ## Two datacenters on loopback (FEDERATION=1: three that find each other): STAY=1 keeps them, BREAK=gateway|sidecar|cert|record spoils one part
	@$(GO) run ./test/demo --culvert $(BIN)/culvert --serf $(CACHE)/bin/serf $(if $(FEDERATION),--federation) $(if $(BREAK),--break $(BREAK)) $(if $(STAY),--stay)

# The end-to-end tests wait for most of their time, each in a network of its own:
# five at once leave more than half of two cores idle. Of the others the longest
# is begun first.
.PHONY: test
test: e2e-tools serf race-note root-note ## Every test, end-to-end tests included (root and iproute2; CULVERT_E2E=require fails where they are missing)
	@$(GO) test $(RACE) -shuffle=on -timeout 10m $(RUNFLAGS) ./federation/store $$($(GO) list ./... | grep -vE '^culvert/test(/interop)?$$')
	@$(if $(RACE),$(GO) test -count=1 -run AllocatesNothing ./alpn ./sidecar)
	@$(GO) test -run TestMemberMoves ./federation/store # which is left out under the race detector, and says why
	@mkdir -p $(CACHE) && rm -f $(SUMMARY)
	@CULVERT_E2E_SUMMARY=$(SUMMARY) $(GO) test $(RACE) -shuffle=on -timeout 20m -count=1 -parallel 5 $(RUNFLAGS) ./test; status=$$?; cat $(SUMMARY); exit $$status

# Not part of the check, which is to stay below a quarter of an hour: on two cores
# with other work `make servers` took 447 s for Consul, 232 s for Nomad and 124 s for
# Alertmanager when nothing was cached, and the tests take half an hour.
.PHONY: interop
interop: build e2e-tools gateways servers wanfed ## Real Consul, Nomad and Alertmanager behind sidecars, HAProxy and nginx as gateways (root; 50 minutes the first time, half an hour after that)
	@CULVERT_INTEROP=require CULVERT_E2E=require $(GO) test -count=1 -timeout 60m -v $(RUNFLAGS) ./test/interop | grep -vE '^(=== |\{)'

.PHONY: servers
servers:
	@for s in consul nomad alertmanager; do $(GO) -C test/servers/$$s build -o $(CACHE)/bin/ tool; done

.PHONY: gateways
gateways:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! (command -v haproxy && command -v nginx && test -d /usr/share/doc/libnginx-mod-stream) >/dev/null; then \
		echo "fetching haproxy and nginx with its stream module"; \
		(apt-get update && apt-get install -y --no-install-recommends haproxy nginx libnginx-mod-stream) >/dev/null 2>&1 \
			|| echo "they could not be installed: the tests will say so"; \
	fi

# End-to-end tests need ip(8) and nft(8). As root on Debian they are fetched
# where they are missing; elsewhere the tests themselves say what they lack.
.PHONY: e2e-tools
e2e-tools:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! (command -v ip && command -v nft) >/dev/null; then \
		echo "fetching iproute2 and nftables for the end-to-end tests"; \
		(apt-get update && apt-get install -y --no-install-recommends iproute2 nftables) >/dev/null 2>&1 \
			|| echo "iproute2 and nftables could not be installed: the end-to-end tests will say so"; \
	fi

.PHONY: race-note
race-note:
	@$(if $(RACE),true,echo "no C compiler: tests run without the race detector")

.PHONY: root-note
root-note:
	@[ "$$(id -u)" = 0 ] || echo "not root: tests that change the kernel's rules or routes in a namespace of their own are skipped"

.PHONY: check
check: RACE := -race
check: build vet lint tidy test fuzz bench-once ## What CI runs: build, vet, lint, tidy, tests with the race detector, short fuzz, each benchmark once

.PHONY: vet
vet:
	@$(GO) vet ./...

# A go build of the linter is kept in the build cache, so that only the first
# one takes its 90 s.
.PHONY: lint
lint: ## golangci-lint with the pinned version
	@$(GO) -C tools build -o $(CACHE)/bin/ tool
	@$(CACHE)/bin/golangci-lint run ./...

.PHONY: fmt
fmt: ## Format with gofumpt
	@$(GO) -C tools build -o $(CACHE)/bin/ tool
	@$(CACHE)/bin/gofumpt -w $$(git ls-files '*.go')

.PHONY: tidy
tidy:
	@$(GO) mod tidy -diff
	@$(GO) mod verify >/dev/null

# A count of inputs and no time: Go's fuzzer can take the end of its time for a
# failure ("context deadline exceeded", and no input beside it), while a count is
# reached or a failure found. One program a package, since each is instrumented down
# to the standard library and linked anew. An input that is never done with ends its
# target after HANG.
.PHONY: fuzz
fuzz: ## Each fuzz target with FUZZTIME inputs (a count as 20000x; by default what each does in 3 to 5 s)
	@mkdir -p $(CACHE)/fuzz
	@targets=$$(grep -roE --include='*_test.go' '^func Fuzz[A-Za-z0-9]+' . | sed -E 's,^\./(.*)/[^/]+:func (.*),\1 \2,' | sort); \
	while read -r dir target; do \
		program=$(CACHE)/fuzz/$${dir//\//-}.test; \
		if [ "$$dir" != "$${last:-}" ]; then $(GO) test -c -fuzz . -o $$program ./$$dir; last=$$dir; fi; \
		count=$(FUZZTIME); \
		[ -n "$$count" ] || count=$$(tr ' ' '\n' <<<"$(INPUTS)" | sed -n "s,^$$dir:$$target=,,p"); \
		count=$${count:-10000x}; \
		echo "fuzz $$dir:$$target with $$count"; \
		(cd $$dir && timeout --foreground --signal INT --kill-after 10 $(HANG) $$program -test.run '^$$' -test.fuzz "^$$target$$" \
			-test.fuzztime $$count -test.fuzzminimizetime 50x -test.fuzzcachedir $(CACHE)/fuzz/$$dir </dev/null) \
			|| { [ $$? != 124 ] || echo "FAIL: $$dir:$$target is not done after $(HANG)"; exit 1; }; \
	done <<<"$$targets"

# That they still run, not what they say: -short makes the long ones short, and a
# thousand peers take minutes, where ten are done in seconds.
.PHONY: bench-once
bench-once: e2e-tools
	@$(GO) test -short -run '^$$' -bench . -skip '$(MANY)' -benchtime 1x -timeout 10m $(BENCHED) >$(CACHE)/bench-once.txt || { cat $(CACHE)/bench-once.txt; exit 1; }
	@echo "benchmarks: $$(grep -c '^Benchmark' $(CACHE)/bench-once.txt) run once"

.PHONY: bench
bench: build e2e-tools ## Benchmarks, a table a topic (BENCHTIME=1s; not those that take long: bench-scale, bench-serf)
	@$(GO) test -run '^$$' -bench . -skip '$(MANY)' -benchmem -benchtime $(BENCHTIME) $(BENCHED) | $(GO) run ./test/tables

.PHONY: bench-scale
bench-scale: build ## One sidecar with up to 5,000 peers, and a store that 3,000 processes follow (minutes)
	@$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 30m ./test/scale | $(GO) run ./test/tables

# Part of `make bench` too, where each has a single round.
.PHONY: bench-link
bench-link: build e2e-tools ## Streams and packets across an emulated WAN link, beside plain TCP (ROUNDS=5, root)
	@CULVERT_E2E=require $(GO) test -run '^$$' -bench . -benchtime $(ROUNDS)x -timeout 30m ./test/link

.PHONY: bench-serf
bench-serf: build serf e2e-tools ## Twenty serf agents across a lossy link, beside plain routing (WATCH=5m RUNS=3 JOINS=9, root; 35 minutes)
	@CULVERT_E2E=require CULVERT_SERF=$(WATCH) CULVERT_SERF_RUNS=$(RUNS) CULVERT_SERF_JOINS=$(JOINS) $(GO) test -run '^$$' -bench Serf -benchtime 1x -timeout 120m ./test/link

# What Culvert is compared with comes from Debian, as the gateways of `interop` do.
.PHONY: peers
peers: gateways
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v stunnel4 >/dev/null; then \
		echo "fetching stunnel4"; \
		(apt-get update && apt-get install -y --no-install-recommends stunnel4) >/dev/null 2>&1 \
			|| echo "it could not be installed: its rows will say so"; \
	fi

.PHONY: bench-peers
bench-peers: build peers ## Culvert beside HAProxy, nginx and stunnel (TOPIC=gateway-bulk,... ROUNDS=5)
	@$(GO) run ./test/bench --culvert $(BIN)/culvert --rounds $(ROUNDS) $(if $(TOPIC),--topic $(TOPIC))

.PHONY: soak
soak: ## The test of a primary that is away, for five minutes (root)
	@CULVERT_E2E=require CULVERT_SOAK=5m $(GO) test -count=1 -timeout 15m -v -run TestFederationWithoutItsPrimary ./test

.PHONY: wanfed
wanfed: build race-note ## Consul's own transport and RPC, as a library, against bin/culvert (fetches Consul's module; minutes when nothing is cached)
	@$(GO) -C test/wanfed test $(RACE) -count=1 -timeout 10m $(RUNFLAGS) ./...

.PHONY: bench-wanfed
bench-wanfed: build ## Packets through two sidecars beside Consul's own transport: cost, round trips, silence (four minutes, and Consul's module)
	@$(GO) -C test/wanfed test -run '^$$' -bench . -benchtime 1x -timeout 15m $(RUNFLAGS) .

.PHONY: clean
clean: ## Remove what was built
	@rm -rf $(BIN) $(CACHE)
