// Command lab prepares and uses a lab, the Linux host with KVM and device-mapper
// that package lab boots anywhere:
//
//	lab prepare                 build or find its disks; needs root
//	lab test PACKAGE…           run the packages' tests in one
//	lab run COMMAND…            run a command in one
//	lab shell                   a root shell in one
//	lab boots N                 boot N of them, one after the other, and say how it went
//
// "make lab", "make lab-shell" and "make check" use it. Exit status: of test the
// number of packages that failed, of run and shell that of the command, and 125
// when the lab itself did not work.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/dormouse-sandbox/dormouse/lab"
)

// labFailed is the exit status for what is nobody's test.
const labFailed = 125

// options are the flags, which all verbs share.
type options struct {
	cache   string
	init    string
	out     string
	memMiB  int
	vcpus   int
	timeout time.Duration
	verbose bool
	run     string
	skip    string
	ship    list
	env     list
	bin     string
}

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(v string) error { *l = append(*l, v); return nil }

func main() {
	verb := ""
	if len(os.Args) > 1 {
		verb = os.Args[1]
	}
	var o options
	flags := flag.NewFlagSet("lab "+verb, flag.ExitOnError)
	flags.StringVar(&o.cache, "cache", "/var/cache/dormouse", "where builds are kept")
	flags.StringVar(&o.init, "init", "build/lab-init", "the lab's init (prepare)")
	flags.StringVar(&o.out, "out", "build/lab-results", "where logs, results and core files go")
	flags.IntVar(&o.memMiB, "mem", 4096, "memory of the lab in MiB")
	flags.IntVar(&o.vcpus, "cpus", 2, "processors of the lab")
	flags.DurationVar(&o.timeout, "timeout", 15*time.Minute, "everything ends by then")
	flags.BoolVar(&o.verbose, "v", false, "show all output as it comes (test)")
	flags.StringVar(&o.run, "run", "", "only tests that match (test)")
	flags.StringVar(&o.skip, "skip", "", "no tests that match (test)")
	flags.Var(&o.ship, "ship", "FOLDER:PATH: put a copy of a folder there (may be repeated)")
	flags.Var(&o.env, "env", "NAME=VALUE for what runs inside (may be repeated)")
	flags.StringVar(&o.bin, "bin", "", "programs to ship instead of building them (test)")
	if verb == "" {
		flags.Usage()
		os.Exit(labFailed)
	}
	_ = flags.Parse(os.Args[2:]) // it exits

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if verb != "shell" {
		var cancel func()
		ctx, cancel = context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("the time limit of %v is over", o.timeout))
		defer cancel()
	}
	code, err := o.do(ctx, verb, flags.Args())
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
		code = labFailed
	}
	stop()
	os.Exit(code) //nolint:gocritic // nothing above is left to be done
}

func (o options) do(ctx context.Context, verb string, args []string) (int, error) {
	switch verb {
	case "prepare":
		return 0, o.prepare(ctx)
	case "test":
		return o.test(ctx, args)
	case "run":
		return o.command(ctx, args)
	case "shell":
		return o.shell(ctx)
	case "boots":
		return o.boots(ctx, args)
	}
	return 0, fmt.Errorf("%q is not a verb: prepare, test, run, shell, boots", verb)
}

func say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

// session is one booted lab and what belongs to it.
type session struct {
	*lab.Lab
	out  string
	temp string
}

// boot starts a lab with more disks than its own. The caller closes it.
func (o options) boot(ctx context.Context, temp string, disks ...lab.Disk) (*session, error) {
	m, err := readMachine(o.cache)
	if err != nil {
		return nil, err
	}
	if m.Cache != "" {
		disks = append(disks, lab.Disk{Serial: "cache", File: m.Cache, Path: "/var/cache/dormouse", Overlay: true})
	}
	l, err := lab.Boot(ctx, lab.Config{
		QEMU: m.QEMU, Kernel: m.Kernel, Initrd: m.Initrd, Root: m.Root, Disks: disks, Dir: temp,
		VCPUs: o.vcpus, MemMiB: o.memMiB, Say: say,
	})
	if err != nil {
		return nil, err
	}
	took, tries := l.Boot()
	inside := l.Inside()
	note := ""
	if tries > 1 {
		note = fmt.Sprintf(", at attempt %d", tries)
	}
	say("lab: up in %.1fs%s: Linux %s, %d CPUs, %d MiB", took.Seconds(), note, inside.Release, o.vcpus, o.memMiB)
	if len(inside.Missing) > 0 {
		return nil, errors.Join(fmt.Errorf("the lab lacks: %s", strings.Join(inside.Missing, "; ")), l.Close(ctx, ""))
	}
	return &session{Lab: l, out: o.out, temp: temp}, nil
}

// with boots a lab, hands it over, and brings its results back whatever happens.
func (o options) with(ctx context.Context, disks func(temp string) ([]lab.Disk, error), use func(*session) (int, error)) (_ int, err error) {
	temp, err := os.MkdirTemp(tempDir(), "dormouse-lab-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(temp)) }()
	extra, err := disks(temp)
	if err != nil {
		return 0, err
	}
	shipped, err := o.shipped(ctx, temp)
	if err != nil {
		return 0, err
	}
	if err := errors.Join(os.RemoveAll(o.out), os.MkdirAll(o.out, 0o755)); err != nil {
		return 0, err
	}
	s, err := o.boot(ctx, temp, append(extra, shipped...)...)
	if err != nil {
		return 0, err
	}
	code, err := use(s)
	err = errors.Join(err, s.Close(ctx, o.out))
	if cores, _ := filepath.Glob(filepath.Join(o.out, "cores", "*")); len(cores) > 0 { // the pattern is right
		say("lab: core files: %s", strings.Join(cores, " "))
	}
	return code, err
}

// tempDir is where large files may lie: /tmp is a memory file system in places.
func tempDir() string { return "/var/tmp" }

// shipped makes a disk of each folder that is to be shipped.
func (o options) shipped(ctx context.Context, temp string) ([]lab.Disk, error) {
	var disks []lab.Disk
	for i, s := range o.ship {
		from, to, ok := strings.Cut(s, ":")
		if !ok || !filepath.IsAbs(to) {
			return nil, fmt.Errorf("-ship %s: want FOLDER:PATH, with an absolute path", s)
		}
		file := filepath.Join(temp, fmt.Sprintf("ship%d.img", i))
		if err := lab.MakeDisk(ctx, file, from, 0); err != nil {
			return nil, err
		}
		disks = append(disks, lab.Disk{Serial: fmt.Sprintf("ship%d", i), File: file, Path: to, Overlay: true})
	}
	return disks, nil
}

func noDisks(string) ([]lab.Disk, error) { return nil, nil }

// command runs one command in a lab of its own.
func (o options) command(ctx context.Context, args []string) (int, error) {
	if len(args) == 0 {
		return 0, errors.New("run what?")
	}
	return o.with(ctx, noDisks, func(s *session) (int, error) {
		status, err := s.Run(ctx, lab.Command{Args: args, Env: o.env, Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
		if err != nil {
			return 0, err
		}
		if status.Error != "" {
			return 0, errors.New(status.Error)
		}
		for _, left := range status.Left {
			say("lab: killed what the command left running: %s", left)
		}
		return status.Code, context.Cause(ctx)
	})
}
