package template

import "context"

// Assets is everything a host needs to start sandboxes from one template.
type Assets struct {
	Kernel Kernel
	Initrd string
	Base   Template
}

// Prepare makes the default assets: Debian's kernel, the initramfs with this
// guest binary, and the base template. What is there already costs nothing.
func (s *Store) Prepare(ctx context.Context, guestBinary string, p Progress) (Assets, error) {
	var a Assets
	var err error
	if a.Kernel, err = s.Kernel(ctx, KernelConfig{}, p); err != nil {
		return Assets{}, err
	}
	if a.Initrd, err = s.Initramfs(ctx, a.Kernel, guestBinary); err != nil {
		return Assets{}, err
	}
	if a.Base, err = s.Build(ctx, BaseRecipe(), p); err != nil {
		return Assets{}, err
	}
	return a, nil
}
