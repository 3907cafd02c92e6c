package dockerfile_test

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/dockerfile"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// work writes down what there is to do in a stage, one line for each step that
// is more than configuration.
func work(steps []dockerfile.Step) string {
	var out []string
	for _, s := range steps {
		switch {
		case s.Run != nil:
			var env []string
			for _, name := range slices.Sorted(maps.Keys(s.Run.Env)) {
				env = append(env, name+"="+s.Run.Env[name])
			}
			out = append(out, fmt.Sprintf("%d run %q as %q in %s with %s", s.Line, s.Run.Command, s.Run.User, s.Run.Workdir, strings.Join(env, " ")))
		case s.Copy != nil:
			out = append(out, fmt.Sprintf("%d copy %d:%q %q to %s owner %q mode %q unpack %v", s.Line, s.Copy.Stage, s.Copy.Sources, s.Copy.Contents, s.Copy.Dest, s.Copy.Chown, s.Copy.Chmod, s.Copy.Unpack))
		case s.MakeDir != "":
			out = append(out, fmt.Sprintf("%d mkdir %s", s.Line, s.MakeDir))
		case s.Note != "":
			out = append(out, fmt.Sprintf("%d note", s.Line))
		}
	}
	return strings.Join(out, "\n")
}

func TestPlan(t *testing.T) {
	base := oci.Config{Env: map[string]string{"PATH": "/bin"}, WorkingDir: "/base", Cmd: []string{"base"}, Labels: map[string]string{"from": "base"}}
	for _, tt := range []struct {
		name, text string
		args       map[string]string
		want       string
	}{
		{"a run in the shell", "FROM a\nRUN echo hi", nil, `2 run ["/bin/sh" "-c" "echo hi"] as "" in /base with PATH=/bin`},
		{"a run without one", `FROM a` + "\n" + `RUN ["echo", "$PATH"]`, nil, `2 run ["echo" "$PATH"] as "" in /base with PATH=/bin`},
		{"another shell", "FROM a\nSHELL [\"/bin/bash\", \"-ec\"]\nRUN true", nil, `3 run ["/bin/bash" "-ec" "true"] as "" in /base with PATH=/bin`},
		{"lines that go on", "FROM a\nRUN one && \\\n  # a remark\n  two", nil, `2 run ["/bin/sh" "-c" "one &&   two"] as "" in /base with PATH=/bin`},
		{
			"user and directory", "FROM a\nUSER app:www\nWORKDIR sub\nWORKDIR ../x\nRUN true", nil,
			"3 mkdir /base/sub\n4 mkdir /base/x\n" + `5 run ["/bin/sh" "-c" "true"] as "app:www" in /base/x with PATH=/bin`,
		},
		{"variables", "FROM a\nENV A=1 B=${A}x\nENV C=${A:-z}${D:+y}\nRUN true", nil, `4 run ["/bin/sh" "-c" "true"] as "" in /base with A=1 B=x C=1 PATH=/bin`},
		{"an argument with its default", "FROM a\nARG V=1\nRUN true", nil, `3 run ["/bin/sh" "-c" "true"] as "" in /base with PATH=/bin V=1`},
		{"an argument that is given", "FROM a\nARG V=1\nRUN true", map[string]string{"V": "2", "W": "3"}, `3 run ["/bin/sh" "-c" "true"] as "" in /base with PATH=/bin V=2`},
		{"an argument of before FROM", "ARG V=1\nFROM a\nARG V\nRUN true", nil, `4 run ["/bin/sh" "-c" "true"] as "" in /base with PATH=/bin V=1`},
		{"one that is not declared again", "ARG V=1\nFROM a\nRUN true", nil, `3 run ["/bin/sh" "-c" "true"] as "" in /base with PATH=/bin`},
		{"a variable beats an argument", "FROM a\nARG V=1\nENV V=2\nRUN true", map[string]string{"V": "3"}, `4 run ["/bin/sh" "-c" "true"] as "" in /base with PATH=/bin V=2`},
		{"what the platform is", "FROM a\nARG TARGETARCH\nRUN true", nil, `3 run ["/bin/sh" "-c" "true"] as "" in /base with PATH=/bin TARGETARCH=amd64`},
		{"a document for the shell", "FROM a\nRUN <<END\none\ntwo\nEND", nil, `2 run ["/bin/sh" "-c" "one\ntwo\n"] as "" in /base with PATH=/bin`},
		{"a document for a program", "FROM a\nRUN cat <<END >x\none\nEND", nil, `2 run ["/bin/sh" "-c" "cat <<END >x\none\nEND"] as "" in /base with PATH=/bin`},
		{
			"copies", "FROM a\nCOPY --chown=app:www --chmod=755 a b/*.go /dest\nCOPY x y\nCOPY . .", nil,
			`2 copy -1:["a" "b/*.go"] [] to /dest/ owner "app:www" mode "755" unpack false` + "\n" +
				`3 copy -1:["x"] [] to /base/y owner "" mode "" unpack false` + "\n" + `4 copy -1:["."] [] to /base/ owner "" mode "" unpack false`,
		},
		{"an add", "FROM a\nADD a.tar.gz /", nil, `2 copy -1:["a.tar.gz"] [] to / owner "" mode "" unpack true`},
		{
			"a document as a file", "FROM a\nENV V=1\nCOPY <<END <<\"RAW\" /etc/\n$V\nEND\n$V\nRAW", nil,
			`3 copy -1:[] [{"END" "1\n"} {"RAW" "$V\n"}] to /etc/ owner "" mode "" unpack false`,
		},
		{"volumes", "FROM a\nVOLUME /data", nil, "2 note"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := dockerfile.Parse([]byte(tt.text), tt.args)
			if err != nil {
				t.Fatal(err)
			}
			steps, err := f.Plan(len(f.Stages)-1, base)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, work(steps)); diff != "" {
				t.Error(diff)
			}
		})
	}
	if base.Env["A"] != "" || base.Labels["a"] != "" {
		t.Errorf("planning has changed the base: %v", base)
	}
}

func TestConfigurationThatHoldsInTheEnd(t *testing.T) {
	text := `FROM a
ENV MODE=prod
LABEL a=b "c d"=$MODE
EXPOSE 80 53/udp 80/tcp
STOPSIGNAL SIGINT
HEALTHCHECK --interval=5s --timeout=1s --retries=4 CMD wget -q localhost
ENTRYPOINT ["/app"]
CMD ["--port", "80"]
USER 1000
`
	f, err := dockerfile.Parse([]byte(text), nil)
	if err != nil {
		t.Fatal(err)
	}
	steps, err := f.Plan(0, oci.Config{Labels: map[string]string{"from": "base"}, Cmd: []string{"base"}})
	if err != nil {
		t.Fatal(err)
	}
	want := oci.Config{
		Env: map[string]string{"MODE": "prod"}, Labels: map[string]string{"from": "base", "a": "b", "c d": "prod"},
		ExposedPorts: []string{"53/udp", "80/tcp"}, StopSignal: "SIGINT", User: "1000", Entrypoint: []string{"/app"}, Cmd: []string{"--port", "80"},
		Healthcheck: &oci.Healthcheck{Test: []string{"CMD-SHELL", "wget -q localhost"}, Interval: 5 * time.Second, Timeout: time.Second, Retries: 4},
	}
	if diff := cmp.Diff(want, steps[len(steps)-1].Config); diff != "" {
		t.Error(diff)
	}
	f, err = dockerfile.Parse([]byte("FROM a\nENTRYPOINT x y"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if steps, err = f.Plan(0, oci.Config{Cmd: []string{"base"}}); err != nil {
		t.Fatal(err)
	}
	if c := steps[0].Config; len(c.Cmd) > 0 || strings.Join(c.Entrypoint, "|") != "/bin/sh|-c|x y" {
		t.Errorf("an entrypoint keeps the command of the base: %+v", c)
	}
}

func TestStages(t *testing.T) {
	f, err := dockerfile.Parse([]byte("ARG V=12\nFROM debian:$V AS Build\nRUN make\nFROM build AS test\nRUN test\nFROM scratch\nCOPY --from=build /out /\nCOPY --from=1 /x /\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range f.Stages {
		got = append(got, fmt.Sprintf("%s=%s/%d@%d", s.Name, s.Image, s.Base, s.Line))
	}
	if want := "build=debian:12/-1@2 test=/0@4 =scratch/-1@6"; strings.Join(got, " ") != want {
		t.Errorf("stages %v, want %s", got, want)
	}
	steps, err := f.Plan(2, oci.Config{})
	if err != nil || steps[0].Copy.Stage != 0 || steps[1].Copy.Stage != 1 {
		t.Errorf("%+v, %v", steps, err)
	}
	for name, want := range map[string]int{"": 2, "BUILD": 0, "test": 1, "1": 1} {
		if i, err := f.Target(name); err != nil || i != want {
			t.Errorf("target %q is %d, %v", name, i, err)
		}
	}
	if _, err := f.Target("nonesuch"); !sandbox.Is(err, sandbox.KindInvalid) {
		t.Errorf("a target that is not there: %v", err)
	}
}

func TestWhatIsRefusedNamesItsLine(t *testing.T) {
	for _, tt := range []struct{ text, says string }{
		{"", "file with no instructions"},
		{"RUN true", "no build stage"},
		{"FROM a\nRUM true", "unknown instruction: RUM"},
		{"FROM a\n\nRUN --mount=type=cache,target=/x true", "line 3: RUN --mount is not known here"},
		{"FROM a\nRUN --network=none true", "line 2: RUN --network"},
		{"FROM a\nRUN <<END\n#!/usr/bin/python3\nEND", "line 2: RUN with a document for another interpreter"},
		{"FROM a\nADD https://example.com/x /", "line 2: ADD https://example.com/x: nothing is fetched from the network"},
		{"FROM a\nADD git@github.com:a/b.git /", "line 2"},
		{"FROM a\nCOPY --from=b /x /", "line 2: COPY --from=b: there is no earlier stage of that name"},
		{"FROM a AS b\nCOPY --from=b /x /", "line 2: COPY --from=b"},
		{"FROM a\nCOPY --parents a /", "line 2: COPY --parents"},
		{"FROM a\nCOPY $nothing /", "line 2: a source is empty"},
		{"FROM a\nCOPY a $nothing", "line 2: the destination is empty"},
		{"FROM a\nONBUILD RUN true", "line 2: ONBUILD"},
		{"FROM $nothing", "line 1: FROM names no image"},
		{"FROM --platform=linux/arm64 a", "line 1: FROM --platform=linux/arm64"},
		{"FROM a\nENV A=${B:?needed}", "B: needed"},
		{"FROM a\n" + strings.Repeat("RUN true\n", 300), "more than 256 instructions"},
		{strings.Repeat("FROM a\n", 40), "40 stages"},
		{"FROM a\nRUN " + strings.Repeat("x", 2<<20), "at most 1048576"},
	} {
		f, err := dockerfile.Parse([]byte(tt.text), nil)
		if err == nil {
			_, err = f.Plan(len(f.Stages)-1, oci.Config{})
		}
		if !sandbox.Is(err, sandbox.KindInvalid) || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%.60q: error of kind %s: %v", tt.text, sandbox.KindOf(err), err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, text := range []string{
		"FROM a AS b\nARG V=1\nRUN <<END\nx\nEND\nCOPY --from=b a b\n", "# escape=`\nFROM a\nENV A=${B:-c}`\n D=e\nHEALTHCHECK NONE\n",
		"ARG A\nFROM $A\nADD --chmod=7 [\"a b\", \"c\"]\nSHELL [\"x\"]\nEXPOSE 1-3\nVOLUME a\nSTOPSIGNAL 9\n",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		file, err := dockerfile.Parse([]byte(text), map[string]string{"A": "x"})
		if err != nil {
			return
		}
		for i, s := range file.Stages {
			if s.Base >= i {
				t.Errorf("stage %d lies on stage %d", i, s.Base)
			}
			steps, err := file.Plan(i, oci.Config{})
			if err != nil {
				continue
			}
			for _, s := range steps {
				if s.Copy != nil && (!strings.HasPrefix(s.Copy.Dest, "/") || s.Copy.Stage >= i) || s.Run != nil && !strings.HasPrefix(s.Run.Workdir, "/") {
					t.Errorf("%+v", s)
				}
			}
		}
	})
}
