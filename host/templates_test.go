package host_test

import (
	"context"
	"slices"
	"strings"
	"testing"

	"github.com/dormouse-sandbox/dormouse/host"
	"github.com/dormouse-sandbox/dormouse/sandbox"
	"github.com/dormouse-sandbox/dormouse/template"
	"github.com/dormouse-sandbox/dormouse/template/oci"
)

// kitchen remembers what it was asked for.
type kitchen struct {
	recipes []template.Recipe
	imports []template.Import
	cooked  []template.Dockerfile
	deleted []string
	hold    func(context.Context) error
}

func (k *kitchen) Build(_ context.Context, r template.Recipe, _ template.Progress) (template.Template, error) {
	k.recipes = append(k.recipes, r)
	return template.Template{Name: r.Name}, nil
}

func (k *kitchen) Import(ctx context.Context, imp template.Import, _ template.Progress) (template.Template, error) {
	k.imports = append(k.imports, imp)
	if k.hold != nil {
		return template.Template{}, k.hold(ctx)
	}
	return template.Template{Name: imp.Name}, nil
}

func (k *kitchen) BuildDockerfile(_ context.Context, d template.Dockerfile, _ template.Progress) (template.Template, error) {
	k.cooked = append(k.cooked, d)
	return template.Template{Name: d.Name}, nil
}

func (k *kitchen) Delete(_ context.Context, name string) error {
	k.deleted = append(k.deleted, name)
	return nil
}

func withKitchen(t *testing.T) (*rig, *kitchen) {
	r, k := newRig(t), &kitchen{}
	r.agentCfg = func(c *host.Config) { c.Kitchen = k }
	r.open()
	return r, k
}

func TestBuildTemplateAsks(t *testing.T) {
	r, k := withKitchen(t)
	login := map[string]oci.Credentials{"index.docker.io": {Username: "me"}}
	for _, req := range []host.BuildRequest{
		{Name: "a", Source: host.SourceImage, Image: "debian:12", Registries: login},
		{Name: "b", Source: host.SourceArchive, Image: "x"},
		{Name: "c", Source: host.SourceRootFS},
		{Name: "e", Source: host.SourcePackages, Suite: "trixie", Packages: []string{"git"}, ImageMiB: 512},
		{Name: "d", Source: host.SourceDockerfile, Args: map[string]string{"A": "b"}, Target: "t"},
	} {
		if _, err := r.agent.BuildTemplate(t.Context(), req, strings.NewReader(""), nil); err != nil {
			t.Errorf("%s: %v", req.Source, err)
		}
	}
	if from, ok := k.imports[0].From.(template.Registry); !ok || from.Credentials.Username != "me" || from.Ref != "debian:12" {
		t.Errorf("an image: %+v", k.imports[0])
	}
	if from, ok := k.imports[1].From.(template.Archive); !ok || from.Image != "x" || from.Reader == nil {
		t.Errorf("an archive: %+v", k.imports[1])
	}
	if _, ok := k.imports[2].From.(template.Tar); !ok {
		t.Errorf("a root file system: %+v", k.imports[2])
	}
	if r := k.recipes[0]; r.Name != "e" || r.Suite != "trixie" || r.ImageMiB != 512 || !slices.Contains(r.Packages, "git") || !slices.Contains(r.Packages, "sudo") {
		t.Errorf("packages: %+v", r)
	}
	if d := k.cooked[0]; d.Args["A"] != "b" || d.Target != "t" || d.Runner != (host.Steps{Agent: r.agent}) {
		t.Errorf("a Dockerfile: %+v", d)
	}
}

func TestBuildTemplateIsBounded(t *testing.T) {
	r, k := withKitchen(t)
	long := strings.Repeat("x", 5000)
	for name, req := range map[string]host.BuildRequest{
		"a name that is a path":     {Name: "../x", Source: host.SourceRootFS},
		"no source":                 {Name: "x"},
		"another source":            {Name: "x", Source: "floppy"},
		"no image":                  {Name: "x", Source: host.SourceImage},
		"no packages":               {Name: "x", Source: host.SourcePackages},
		"a long image":              {Name: "x", Source: host.SourceImage, Image: long},
		"a long argument":           {Name: "x", Source: host.SourceDockerfile, Args: map[string]string{"A": long}},
		"a NUL byte":                {Name: "x", Source: host.SourceDockerfile, Target: "a\x00"},
		"a long password":           {Name: "x", Source: host.SourceRootFS, Registries: map[string]oci.Credentials{"a": {Password: long}}},
		"a token that is much more": {Name: "x", Source: host.SourceRootFS, Registries: map[string]oci.Credentials{"a": {Token: strings.Repeat("x", 1<<20)}}},
	} {
		if _, err := r.agent.BuildTemplate(t.Context(), req, nil, nil); !sandbox.Is(err, sandbox.KindInvalid) || len(err.Error()) > 400 {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(k.imports)+len(k.cooked) > 0 {
		t.Error("something was built all the same")
	}
	r.free.Store(0)
	if _, err := r.agent.BuildTemplate(t.Context(), host.BuildRequest{Name: "x", Source: host.SourceRootFS}, nil, nil); !sandbox.Is(err, sandbox.KindNoSpace) {
		t.Errorf("on a full disk: %v", err)
	}
}

func TestBuildsTakeTurnsAndEndWithTheAgent(t *testing.T) {
	r, k := withKitchen(t)
	running, ended := make(chan struct{}, 2), make(chan error, 2)
	hold := func(ctx context.Context) error {
		running <- struct{}{}
		<-ctx.Done()
		return context.Cause(ctx)
	}
	req := host.BuildRequest{Name: "x", Source: host.SourceRootFS}
	k.hold = hold
	for range 2 {
		go func() {
			_, err := r.agent.BuildTemplate(context.Background(), req, nil, nil)
			ended <- err
		}()
		<-running
	}
	if _, err := r.agent.BuildTemplate(t.Context(), req, nil, nil); !sandbox.Is(err, sandbox.KindBusy) {
		t.Errorf("a third build: %v", err)
	}
	if err := r.agent.Close(); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := <-ended; !sandbox.Is(err, sandbox.KindTransient) {
			t.Errorf("a build whose agent has closed: %v", err)
		}
	}
}

func TestDeleteTemplateIsRefusedWhileSandboxesLieOnIt(t *testing.T) {
	r, k := withKitchen(t)
	first, second := r.mustCreate(), r.mustCreate()
	err := r.agent.DeleteTemplate(t.Context(), "base")
	if !sandbox.Is(err, sandbox.KindConflict) || !strings.Contains(err.Error(), string(first)) || !strings.Contains(err.Error(), string(second)) {
		t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
	}
	for _, id := range []sandbox.ID{first, second} {
		if _, err := r.agent.Destroy(t.Context(), string(id), ""); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.agent.DeleteTemplate(t.Context(), "base"); err != nil || len(k.deleted) != 1 {
		t.Errorf("after their end: %v, %v", err, k.deleted)
	}
	if err := r.agent.DeleteTemplate(t.Context(), "nonesuch"); !sandbox.Is(err, sandbox.KindNotFound) {
		t.Errorf("a template that is not there: %v", err)
	}
}

func TestHostWithoutAKitchen(t *testing.T) {
	r := newRig(t)
	r.open()
	_, err := r.agent.BuildTemplate(t.Context(), host.BuildRequest{Name: "x", Source: host.SourceRootFS}, nil, nil)
	if !sandbox.Is(err, sandbox.KindUnsupported) || !sandbox.Is(r.agent.DeleteTemplate(t.Context(), "x"), sandbox.KindUnsupported) {
		t.Errorf("error of kind %s: %v", sandbox.KindOf(err), err)
	}
}
