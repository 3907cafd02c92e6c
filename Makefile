# Dormouse. `make` alone says what there is.
#
# Everything is built by the user who types; only `dormouse up`, `dormouse down`
# and the tests that need root go through sudo. Nothing root-owned is left in
# the checkout or in the user's Go caches.

SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS   += --no-print-directory
.DEFAULT_GOAL := help

# Go may sit where a login shell would not look; mke2fs is in sbin. A Go older
# than go.mod asks for fetches the right one by itself (GOTOOLCHAIN=auto).
export PATH := $(CURDIR)/build/go/bin:$(PATH):/usr/local/go/bin:/usr/sbin:/sbin
export GOTOOLCHAIN ?= auto
export CGO_ENABLED ?= 0

UID  := $(shell id -u)
SUDO := $(if $(filter 0,$(UID)),,sudo)
# `sudo make` still builds as the user who typed it.
AS_USER := $(if $(and $(filter 0,$(UID)),$(SUDO_UID),$(filter-out 0,$(SUDO_UID))),sudo -H -u \#$(SUDO_UID) -g \#$(SUDO_GID) env PATH=$(PATH) GOTOOLCHAIN=$(GOTOOLCHAIN) CGO_ENABLED=$(CGO_ENABLED) REQUIRE=$${REQUIRE:-} DORMOUSE_LONG=$${DORMOUSE_LONG:-},)
GO   := $(AS_USER) go
TOOL := $(GO) tool -modfile=tools/go.mod

VERSION   := $(shell git -c safe.directory='*' describe --tags --always --dirty 2>/dev/null || echo unknown)
BUILD     := $(GO) build -trimpath -buildvcs=false -ldflags '-s -w -X main.version=$(VERSION)'
STAGE     := scripts/stage
# With REQUIRE a skipped test is a failure: all of this is installed by `make check-deps` or prepared by check-assets.
REQUIRE_TOOLS := assets,buf,busybox-static,bzip2,e2fsprogs,ip,iptables-nft,mke2fs,mmdebstrap,musl,nft,qemu-img,qemu-io,qemu-system-x86_64,xz
TESTFLAGS ?=
# Packages whose tests need root, found by what they call. Whole-system tests have stages of their own.
ROOT_PKGS  = $(shell grep -rlw --include='*_test.go' 'testkit\.Root' . | grep -v -E '^\./(test|build)/' | xargs -r -n1 dirname | sort -u)
UNIT_PKGS  = $(filter-out $(patsubst ./%,github.com/dormouse-sandbox/dormouse/%,$(ROOT_PKGS)),$(shell $(GO) list ./... | grep -vE '/dormouse/test/(api|bench|chaos|e2e|page|sdk|up)$$'))
AS_ROOT    = $(if $(SUDO)$(AS_USER),-exec "$(CURDIR)/scripts/as-root",)
SYSTEM     = $(GO) test -count=1 -p 1 $(AS_ROOT) $(TESTFLAGS)

# Packages whose tests need root, KVM or device-mapper run in the lab, a Linux host under QEMU's software emulation, too.
# Two labs at once make the most of two processors: VMs inside one leave the other processor alone. Tests over fakes
# run in them for make check-all only.
LAB_HOUSE := ./cgroup ./disk/dm ./netns ./host/base ./test/up
LAB_VMS   := ./vmm/qemu ./host
LAB_PKGS  ?= $(LAB_HOUSE) $(LAB_VMS)
# Sweeps that need nothing of it, over fakes or of what the tests as root have failed step by step already.
LAB_SKIP := [a-z](FailsAt|KilledAt)$$|(Fails|Fail|Cancelled|AKill)AtEachStep$$|^Test(Races|RandomLives|LongLinesAreFlattened)$$
PKG      ?= $(LAB_PKGS)
LABFLAGS ?=

.PHONY: lab lab-house lab-vms lab-shell lab-ready check-lab check-lab-all help up down demo doctor deps check-deps build release generate vendor-page fmt check check-all bench \
        check-format check-vet check-lint check-build check-assets check-unit check-root check-e2e

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

up: deps build ## install what is missing, build, start the server on 127.0.0.1:7070, prove that it works
	@$(SUDO) bin/dormouse up --detach

down: ## stop the server and every sandbox, leave nothing behind but the data
	@if [ ! -x bin/dormouse ]; then $(MAKE) build; fi
	@$(SUDO) bin/dormouse down

demo: ## the self-proof alone, against the running server
	@bin/dormouse demo

doctor: build ## what this machine has and lacks, with the cure for each thing
	@bin/dormouse doctor

deps: ## install the Debian packages that are missing, and say which
	@scripts/install-deps

check-deps: # what only the tests use, too
	@scripts/install-deps --check

build: ## bin/dormouse and bin/dormouse-guest
	@$(AS_USER) mkdir -p bin
	@[ -x bin/dormouse ] || echo 'building bin/dormouse and bin/dormouse-guest: the first time takes minutes'
	@$(BUILD) -o bin/dormouse ./cmd/dormouse
	@$(BUILD) -o bin/dormouse-guest ./cmd/dormouse-guest

generate: ## generated code anew, from the .proto files
	@$(TOOL) buf generate

vendor-page: # fetch what web/test/vendor/VERSIONS lists from npm
	@$(AS_USER) scripts/vendor-page web/test/vendor

fmt: ## format all Go code
	@$(TOOL) gofumpt -w $$(git ls-files '*.go' | grep -v /gen/)

check: check-deps ## everything CI runs
	@start=$$SECONDS; \
	for s in format vet lint build assets unit; do $(MAKE) check-$$s; done; \
	$(MAKE) -j2 check-root check-e2e; \
	$(MAKE) check-lab; \
	printf 'make check: all passed in %dm%02ds\n' $$(( (SECONDS-start)/60 )) $$(( (SECONDS-start)%60 ))

check-format:
	@$(STAGE) "format (gofumpt)" -- bash -c 'out=$$($(TOOL) gofumpt -l $$(git ls-files "*.go" | grep -v /gen/)); \
	  [ -z "$$out" ] || { echo "not formatted, run make fmt:"; echo "$$out"; exit 1; }'

check-vet:
	@$(STAGE) "go vet" -- $(GO) vet ./...

check-lint:
	@$(STAGE) "staticcheck" -- $(TOOL) staticcheck ./...
	@$(STAGE) "errcheck" -- $(TOOL) errcheck ./...

check-build:
	@$(STAGE) "build" -- $(MAKE) build
	@$(STAGE) "build, release" -- $(GO) build -trimpath -buildvcs=false -tags release -o /dev/null ./cmd/...

check-assets: build
	@$(STAGE) "what test VMs boot" -- bash -c '$(GO) build -o build/assets ./test/assets && $(SUDO) build/assets'

check-unit:
	@REQUIRE=$(REQUIRE_TOOLS) $(STAGE) --show "unit tests" -- $(GO) test -timeout 10m $(TESTFLAGS) $(UNIT_PKGS)

check-root:
	@$(if $(strip $(ROOT_PKGS)),REQUIRE=root$(,)$(REQUIRE_TOOLS) $(STAGE) --show "tests as root" -- \
	  $(GO) test -timeout 10m -p 2 $(AS_ROOT) $(TESTFLAGS) $(ROOT_PKGS),:)

check-e2e:
	@REQUIRE=root,$(REQUIRE_TOOLS) $(STAGE) --show "end to end" -- $(SYSTEM) -p 2 -timeout 25m ./test/up/... ./test/e2e/... ./test/chaos/...

check-all: check ## check, then what takes longer: the race detector, the whole system on KVM in a lab, crash sweeps, soak, public SDKs
	@if command -v gcc >/dev/null; then \
	  CGO_ENABLED=1 $(STAGE) --show "unit tests, race detector" -- $(GO) test -race -timeout 20m $(UNIT_PKGS); \
	else echo "skip race detector: it needs gcc (apt-get install gcc libc6-dev)"; fi
	@DORMOUSE_LONG=1 REQUIRE=root$(,)$(REQUIRE_TOOLS) $(STAGE) --show "tests as root, long" -- \
	  $(GO) test -timeout 60m -p 2 $(AS_ROOT) $(TESTFLAGS) $(ROOT_PKGS)
	@for d in e2e chaos api sdk page; do if ls test/$$d/*_test.go >/dev/null 2>&1; then \
	  DORMOUSE_LONG=1 REQUIRE=root,$(REQUIRE_TOOLS) $(STAGE) --show "$$d" -- $(SYSTEM) -timeout 60m ./test/$$d/...; fi; done
	@$(MAKE) check-lab-all

lab: lab-ready ## tests in a host with KVM and device-mapper, under emulation: make lab PKG="./netns ./host" LABFLAGS="-v -run X"
	@$(AS_USER) build/lab test $(LABFLAGS) $(PKG)

lab-shell: lab-ready ## a root shell in such a host
	@$(AS_USER) build/lab shell $(LABFLAGS)

# What a lab boots: built once, minutes the first time. Building needs root, using does not.
lab-ready: check-assets
	@$(AS_USER) mkdir -p build
	@$(GO) build -o build/lab ./test/lab
	@$(GO) build -trimpath -buildvcs=false -ldflags '-s -w -buildid=' -o build/lab-init ./lab/init
	@$(SUDO) build/lab prepare -init build/lab-init

check-lab: lab-ready
	@REQUIRE=$(REQUIRE_TOOLS) $(STAGE) --show "in two labs: KVM, dm, root" -- $(MAKE) -j2 -Oline lab-house lab-vms

lab-house lab-vms: lab-%:
	@$(AS_USER) build/lab test -skip '$(LAB_SKIP)' -out build/lab-results-$* $(LABFLAGS) $(if $(filter house,$*),$(LAB_HOUSE),$(LAB_VMS))

# Twenty sandboxes at once need more memory than most labs. Nothing else should run meanwhile: beside another lab, VMs
# inside one take ten times as long.
check-lab-all:
	@DORMOUSE_LONG=1 REQUIRE=$(REQUIRE_TOOLS) $(STAGE) --show "in the lab: every test of the packages" -- \
	  $(MAKE) lab LABFLAGS="-mem 10240 -timeout 120m $(LABFLAGS)"
	@REQUIRE=$(REQUIRE_TOOLS) $(STAGE) --show "in the lab: the whole system on KVM" -- \
	  $(MAKE) lab PKG="./test/e2e ./test/chaos" LABFLAGS="-mem 10240 -timeout 120m $(LABFLAGS)"

bench: build ## measure, and write docs/benchmarks.md
	@$(SYSTEM) -timeout 60m -run '^$$' -bench . ./test/bench/...

, := ,
