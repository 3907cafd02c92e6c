package e2e_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/dormouse-sandbox/dormouse/api"
	"github.com/dormouse-sandbox/dormouse/client"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template/oci/ocitest"
)

// serving is a Dockerfile whose start command serves what it has become ready
// with, after a while.
const serving = `FROM scratch
ADD root.tar /
ENV COLOUR=blue PATH=/bin
WORKDIR /srv
USER app
HEALTHCHECK --interval=2s --timeout=20s --retries=30 CMD wget -q -O /dev/null http://127.0.0.1:8080/ready
CMD echo "serving as $(id -un) in $(pwd) with $COLOUR"; [ -z "$BROKEN" ] || { echo "no configuration"; exit 3; }; mkdir /tmp/www; sleep 1; echo yes >/tmp/www/ready; exec httpd -f -p 8080 -h /tmp/www
`

func (w world) buildDockerfile(name, text string) {
	w.t.Helper()
	context := ocitest.Tar(w.t, ocitest.File("root.tar", string(busybox(w.t))), ocitest.File("Dockerfile", text))
	w.buildTemplate(api.BuildTemplate{Name: name}, context)
}

// TestStartCommand: what an image runs by itself runs in its sandboxes, and is
// ready when they are.
func TestStartCommand(t *testing.T) {
	w := shared(t)
	w.buildDockerfile("e2e-serving", serving)
	got, err := w.Client.Template(within(t, time.Minute), "e2e-serving")
	if err != nil || len(got.Start) != 3 || got.Start[0] != "/bin/sh" || got.Start[1] != "-c" {
		t.Errorf("it starts %q, %v", got.Start, err)
	}
	want := &api.Healthcheck{
		Test: []string{"CMD-SHELL", "wget -q -O /dev/null http://127.0.0.1:8080/ready"}, IntervalSeconds: 2, TimeoutSeconds: 20, Retries: 30,
	}
	if diff := cmp.Diff(want, got.Healthcheck); diff != "" {
		t.Error(diff)
	}
	req := small()
	req.Template = "e2e-serving"
	t.Run("is ready when the sandbox is", func(t *testing.T) {
		w := w.in(t)
		box := w.create(req)
		if out := w.sh(box.ID, "wget -q -O - http://127.0.0.1:8080/ready"); out != "yes" {
			t.Errorf("it serves %q", out)
		}
		if out := w.sh(box.ID, "cat /run/dormouse/start.log"); out != "serving as app in /srv with blue" {
			t.Errorf("it has said %q", out)
		}
	})
	t.Run("fails its create when it fails", func(t *testing.T) {
		w, broken := w.in(t), req
		broken.Env = map[string]string{"BROKEN": "yes"}
		s := w.mustNotCreate(broken, sandbox.KindInvalid)
		const says = "the start command ended before it was ready: exit status 3; its output ends with:\nserving as app in /srv with blue\nno configuration"
		if s.State != "failed" || s.Cause != "start_failed" || !strings.Contains(s.CauseDetail, says) {
			t.Errorf("it is %s (%s): %s", s.State, s.Cause, s.CauseDetail)
		}
	})
	t.Run("is left alone on request", func(t *testing.T) {
		w, alone, no := w.in(t), req, false
		alone.Start, alone.Env = &no, map[string]string{"BROKEN": "yes"}
		box := w.create(alone)
		if out := w.sh(box.ID, "ls /run/dormouse 2>&1 || true"); !strings.Contains(out, "No such file") {
			t.Errorf("something has run: %s", out)
		}
	})
}

// mustNotCreate is a create that ends in failed, and what is on record of it.
func (w world) mustNotCreate(req api.CreateSandbox, kind sandbox.Kind) api.Sandbox {
	w.t.Helper()
	_, err := w.Client.CreateSandbox(within(w.t, 5*time.Minute), req, "")
	var e *client.Error
	if !errors.As(err, &e) || e.Kind != kind || e.SandboxID == "" {
		w.t.Fatalf("create: %+v", err)
	}
	s, err := w.Client.Get(within(w.t, time.Minute), e.SandboxID)
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// TestHealthcheckThatNeverSucceeds: the create fails, with the last words of both.
func TestHealthcheckThatNeverSucceeds(t *testing.T) {
	w := shared(t)
	w.buildDockerfile("e2e-ill", `FROM scratch
ADD root.tar /
ENV PATH=/bin
HEALTHCHECK --interval=1s --timeout=20s --retries=2 CMD ["sh", "-c", "echo still ill; exit 1"]
ENTRYPOINT ["sh", "-c", "echo I try; exec sleep $0"]
CMD ["1000"]
`)
	req := small()
	req.Template = "e2e-ill"
	s := w.mustNotCreate(req, sandbox.KindTimeout)
	const says = "the health check has failed 2 times; at last: exit status 1, its output ends with:\nstill ill\nthe output of the start command ends with:\nI try"
	if s.State != "failed" || s.Cause != "not_ready" || !strings.Contains(s.CauseDetail, says) {
		t.Errorf("it is %s (%s): %s", s.State, s.Cause, s.CauseDetail)
	}
}

// TestStartCommandThatIsAShell: as base images name one. It finds no input.
func TestStartCommandThatIsAShell(t *testing.T) {
	w := shared(t)
	w.buildDockerfile("e2e-shell", "FROM scratch\nADD root.tar /\nENV PATH=/bin\nCMD [\"sh\"]\n")
	req := small()
	req.Template = "e2e-shell"
	box := w.create(req)
	if out := w.sh(box.ID, "until grep -q exit /run/dormouse/start.log; do sleep 1; done; cat /run/dormouse/start.log"); out != "[exit status 0]" {
		t.Errorf("it has said %q", out)
	}
}
