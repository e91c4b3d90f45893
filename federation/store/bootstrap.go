package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"go.uber.org/zap"

	"culvert/internal/pause"
)

const (
	// promiseTime is how long a node keeps a promise.
	promiseTime = 30 * time.Second
	// proposeTime is how long one who proposes waits for all promises. It is
	// far below promiseTime, so that each is still kept when it begins.
	proposeTime = 10 * time.Second
	// greetTimeout is how long one sibling may take to answer.
	greetTimeout = 2 * time.Second
	// greetEvery is how often siblings are asked.
	greetEvery = time.Second
	// waitingEvery is how often the log says what the store waits for.
	waitingEvery = 30 * time.Second
)

// Neighbours ask siblings of the own datacenter. Both return when ctx ends.
type Neighbours interface {
	// Greet asks who is at an address, host:port.
	Greet(ctx context.Context, address string) (Greeting, error)
	// Promise asks to begin a store with these members, and with none other
	// for a while.
	Promise(ctx context.Context, address string, p Proposal) error
}

// A Greeting is what a server says of itself to a sibling.
type Greeting struct {
	Node    string `json:"node"`
	Address string `json:"address"`
	Begun   bool   `json:"begun"`           // it belongs to a store
	Store   string `json:"store,omitempty"` // which one, as soon as it knows
	Expect  int    `json:"expect"`
	Memory  bool   `json:"memory,omitempty"` // it keeps nothing: it cannot be a member of another's store
}

// A Member is one of those that begin a store.
type Member struct {
	Node    string `json:"node"`
	Address string `json:"address"`
}

// A Proposal is who shall begin a store, in the order of their names.
type Proposal struct {
	Members []Member `json:"members"`
}

func (p Proposal) id() string {
	var b strings.Builder
	for _, m := range p.Members {
		fmt.Fprintf(&b, "%s@%s ", m.Node, m.Address)
	}
	return b.String()
}

func (p Proposal) names() string {
	names := make([]string, len(p.Members))
	for i, m := range p.Members {
		names[i] = m.Node
	}
	return strings.Join(names, ", ")
}

// A promise is kept in memory alone: after a restart a node has nothing to do
// with what was proposed to it before, unless it has begun.
type promise struct {
	to    Proposal
	until time.Time
}

// Greeting answers a neighbour's Greet.
func (s *Store) Greeting() Greeting {
	e := s.current()
	s.mu.Lock()
	defer s.mu.Unlock()
	if e != nil {
		s.known.Begun = e.begun()
	} else if s.failure != nil && !s.known.Begun {
		g := s.known // who knows what is on that disk
		g.Begun = true
		return g
	}
	if id := s.view.Store(); id != "" {
		s.known.Store = id
	}
	return s.known
}

// Promise answers a neighbour's Promise. The error says why not: this server
// has begun, or has promised itself to others within the last 30 s.
func (s *Store) Promise(p Proposal) error {
	e := s.current()
	switch {
	case e == nil:
		return errors.New("its store is not open")
	case len(p.Members) != s.o.Expect:
		return fmt.Errorf("%d servers are to begin, and it has bootstrap_expect %d", len(p.Members), s.o.Expect)
	case !slices.Contains(p.Members, Member{s.o.Node, s.o.Address}):
		return fmt.Errorf("%s at %s is not among those that are to begin: %s", s.o.Node, s.o.Address, p.names())
	case !slices.IsSortedFunc(p.Members, func(a, b Member) int { return cmp.Or(cmp.Compare(a.Node, b.Node), -1) }):
		return errors.New("those that are to begin are not in order, or one is there twice")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if now.Before(s.promise.until) && s.promise.to.id() != p.id() {
		return fmt.Errorf("it has promised to begin with %s", s.promise.to.names())
	}
	if e.begun() {
		return errors.New("it belongs to a store already")
	}
	s.promise = promise{to: p, until: now.Add(promiseTime)}
	return nil
}

// begin begins a store, or waits until this node belongs to one.
func (s *Store) begin(ctx context.Context, e *engine) {
	var said time.Time
	for !e.begun() {
		why, err := s.tryBegin(ctx, e)
		if err != nil {
			why = err.Error()
		}
		if e.begun() || ctx.Err() != nil {
			break
		}
		s.wait(why)
		if time.Since(said) >= waitingEvery {
			s.log.Info("store waits to begin", zap.String("reason", why))
			said = time.Now()
		}
		if !pause.For(ctx, jitter(greetEvery)) {
			return
		}
	}
	s.wait("")
}

func (s *Store) wait(why string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.waiting = why
}

// tryBegin begins a store if it is this node's turn, and otherwise tells what
// it waits for.
func (s *Store) tryBegin(ctx context.Context, e *engine) (why string, err error) {
	self := Member{s.o.Node, s.o.Address}
	switch s.o.Expect {
	case 0:
		return "it has no bootstrap_expect, so it only joins: the leader adds it when it has registered", nil
	case 1:
		return "", s.bootstrap(e, Proposal{[]Member{self}})
	}
	found, missing := s.greetAll(ctx)
	members := []Member{self}
	for _, g := range found {
		switch {
		case g.Begun:
			return fmt.Sprintf("%s belongs to a store already: its leader adds this server when it has registered", g.Node), nil
		case g.Expect == s.o.Expect && !g.Memory:
			members = append(members, Member{g.Node, g.Address})
		case g.Expect != 0:
			missing = append(missing, fmt.Sprintf("%s has bootstrap_expect %d: give all the same", g.Node, g.Expect))
		}
	}
	slices.SortFunc(members, func(a, b Member) int { return cmp.Compare(a.Node, b.Node) })
	if len(members) < s.o.Expect {
		if len(missing) == 0 {
			missing = []string{"start more of them, or name them in retry_join"}
		}
		return fmt.Sprintf("%d of %d servers are there (%s): %s", len(members), s.o.Expect,
			Proposal{members}.names(), strings.Join(missing, "; ")), nil
	}
	p := Proposal{members[:s.o.Expect]}
	if p.Members[0] != self {
		return fmt.Sprintf("%s is to begin, with %s", p.Members[0].Node, p.names()), nil
	}
	return "", s.propose(ctx, e, p)
}

// greetAll asks all that retry_join names. It returns one greeting a node,
// without this one's, and what went wrong.
func (s *Store) greetAll(ctx context.Context) (found []Greeting, missing []string) {
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	addresses := s.o.Join()
	greetings, errs := make([]Greeting, len(addresses)), make([]error, len(addresses))
	var wg sync.WaitGroup
	for i, a := range addresses {
		wg.Go(func() { greetings[i], errs[i] = s.o.Neighbours.Greet(ctx, a) })
	}
	wg.Wait()
	seen := map[string]bool{s.o.Node: true}
	for i, g := range greetings {
		switch {
		case errs[i] != nil:
			missing = append(missing, fmt.Sprintf("%s: %v", addresses[i], errs[i]))
		case !seen[g.Node]:
			seen[g.Node] = true
			found = append(found, g)
		}
	}
	return found, missing
}

// propose begins a store if all its members promise to. The first of them is
// this node.
func (s *Store) propose(ctx context.Context, e *engine, p Proposal) error {
	ctx, cancel := context.WithTimeout(ctx, proposeTime)
	defer cancel()
	if err := s.Promise(p); err != nil {
		return fmt.Errorf("this server may not begin with %s: %w", p.names(), err)
	}
	errs := make([]error, len(p.Members))
	var wg sync.WaitGroup
	for i, m := range p.Members[1:] {
		wg.Go(func() {
			if err := s.o.Neighbours.Promise(ctx, m.Address, p); err != nil {
				errs[i] = fmt.Errorf("%s at %s does not begin with %s: %w", m.Node, m.Address, p.names(), err)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(append(errs, ctx.Err())...); err != nil {
		return err
	}
	return s.bootstrap(e, p)
}

func (s *Store) bootstrap(e *engine, p Proposal) error {
	var c raft.Configuration
	for _, m := range p.Members {
		c.Servers = append(c.Servers, raft.Server{ID: raft.ServerID(m.Node), Address: raftAddress(m.Node, m.Address)})
	}
	if err := e.raft.BootstrapCluster(c).Error(); err != nil {
		return fmt.Errorf("begin a store: %w", err)
	}
	if err := e.disk.failure(); err != nil {
		return err
	}
	s.log.Info("store begins", zap.String("members", p.names()))
	return nil
}
