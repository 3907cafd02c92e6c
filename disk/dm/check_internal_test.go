package dm

import (
	"path/filepath"
	"testing"

	"github.com/dormouse-sandbox/dormouse/disk"
)

// hook calls fn after the next call of a name, once.
func (f *fake) hook(call string, fn func(name string)) {
	f.after = func(made, name string) {
		if made == call {
			f.after = nil
			fn(name)
		}
	}
}

func (r *rig) check() disk.Report {
	r.t.Helper()
	report, err := r.driver.Check(r.t.Context())
	if err != nil {
		r.t.Errorf("Check: %v", err)
	}
	return report
}

// TestCheckSparesWhatComesAndGoes: a disk that is being made or removed is not a
// broken one; its host would end the sandbox.
func TestCheckSparesWhatComesAndGoes(t *testing.T) {
	t.Run("coming", func(t *testing.T) {
		everywhere(t, func(t *testing.T, r *rig) {
			name := r.driver.prefix() + overlayKind + "coming"
			if err := r.look.Make(name); err != nil {
				t.Fatal(err)
			}
			if report := r.check(); len(report.Broken)+len(report.Damage) > 0 {
				t.Errorf("%+v", report)
			}
			if err := r.look.Drop(name); err != nil {
				t.Fatal(err)
			}
		})
	})
	t.Run("going", func(t *testing.T) {
		r := fakeRig(t)
		d := r.create(r.config("disk", r.file("base.img", pattern(4, 1)), 4))
		for lists := range 2 { // of layers, then of overlays
			skip := lists
			r.fake.after = func(call, _ string) {
				if call != "list" {
					return
				}
				if skip--; skip < 0 {
					r.fake.after = nil
					if err := r.look.Drop(filepath.Base(d.Path())); err != nil {
						t.Error(err)
					}
				}
			}
			if report := r.check(); len(report.Broken)+len(report.Damage) > 0 {
				t.Errorf("%+v", report)
			}
			r.fake.after = nil
			d = r.restore(r.config("disk", filepath.Join(r.dir, "base.img"), 4))
		}
	})
}
