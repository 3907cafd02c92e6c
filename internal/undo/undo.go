// Package undo is a stack of clean-up steps. A function that acquires things
// pushes the release of each on the line after it was acquired; on an error it
// runs the stack, on success it hands the stack to the object it built.
package undo

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Limit bounds one run of a stack, whatever the caller's context says.
const Limit = 60 * time.Second

type step struct {
	name string
	fn   func(context.Context) error
}

// Stack is a list of steps that run last in, first out. The zero value is
// empty and ready. It is not safe for concurrent use.
type Stack struct{ steps []step }

// Push adds a step. The name appears in the error if it fails.
func (s *Stack) Push(name string, fn func(context.Context) error) {
	s.steps = append(s.steps, step{name, fn})
}

// PushClose adds a step that needs no context.
func (s *Stack) PushClose(name string, fn func() error) {
	s.Push(name, func(context.Context) error { return fn() })
}

// Run runs every step, last first, also after one of them failed, and joins
// their errors. It ignores the cancellation of ctx: rolling back must not stop
// because the caller went away. The stack is empty afterwards.
func (s *Stack) Run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), Limit)
	defer cancel()
	var errs []error
	for len(s.steps) > 0 {
		last := s.steps[len(s.steps)-1]
		s.steps = s.steps[:len(s.steps)-1]
		if err := last.fn(ctx); err != nil {
			errs = append(errs, fmt.Errorf("undo %s: %w", last.name, err))
		}
	}
	return errors.Join(errs...)
}

// Take empties the stack into a new one: the caller succeeded and whoever gets
// the new stack owns the steps now.
func (s *Stack) Take() *Stack {
	taken := &Stack{steps: s.steps}
	s.steps = nil
	return taken
}

// Len reports how many steps are left.
func (s *Stack) Len() int { return len(s.steps) }
