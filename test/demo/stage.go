package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"
)

// A stage is what both forms of the demo play on: a folder for their files and a
// place to tell what happens.
type stage struct {
	o     options
	out   io.Writer
	dir   string
	began time.Time
}

func newStage(o options, out io.Writer) (stage, error) {
	dir, err := os.MkdirTemp("", "culvert-demo-")
	return stage{o: o, out: out, dir: dir, began: time.Now()}, err
}

func (s *stage) say(format string, args ...any) { _, _ = fmt.Fprintf(s.out, format+"\n", args...) }

// An act is one step of a play. One without a name is left out.
type act struct {
	name string
	do   func() error
}

// perform does one step after the other until one fails.
func (s *stage) perform(acts []act) error {
	for _, a := range acts {
		if a.name == "" {
			continue
		}
		if err := s.step(a); err != nil {
			return err
		}
	}
	return nil
}

// step does one step and tells how it ended; its error names it.
func (s *stage) step(a act) error {
	if err := a.do(); err != nil {
		s.say("%6.2fs  FAILED  %s", time.Since(s.began).Seconds(), a.name)
		return fmt.Errorf("step %q: %w", a.name, err)
	}
	s.say("%6.2fs  ok      %s", time.Since(s.began).Seconds(), a.name)
	return nil
}

// spoiling is the name of the step that spoils a part, "" if none is to be.
func (s *stage) spoiling() string {
	if s.o.spoil == "" {
		return ""
	}
	return "spoil: " + s.o.spoil
}

// culvert runs one of culvert's commands that need no network.
func (s *stage) culvert(ctx context.Context, dir string, args ...string) error {
	_, err := command(ctx, nil, dir, s.o.culvert, args...)
	return err
}
