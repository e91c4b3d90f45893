package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"culvert/certs"
)

func tlsCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tls",
		Short: "Make and inspect certificates",
		Long: `Make the CA that all datacenters share, certificates for servers and gateways,
and see what a certificate is good for.

Files are made in the current folder, and nothing is ever overwritten. The CA's
key belongs on the machine where certificates are made, and on no other.
Certificates from 'consul tls cert create -server -node' can be used as they are.`,
		Example: `  culvert tls ca create
  culvert tls cert create --server --dc dc1 --node alice
  culvert tls cert create --gateway --dc dc1 --node gw1
  culvert tls inspect dc1-server-consul-alice.pem`,
	}
	cmd.AddCommand(tlsCACommand(), tlsCertCommand(), tlsInspectCommand())
	return cmd
}

func tlsCACommand() *cobra.Command {
	var o certs.CAOptions
	create := &cobra.Command{
		Use:   "create",
		Short: "Make a CA",
		Long: `Make the CA, once for all datacenters: DOMAIN-ca.pem, which every sidecar gets, and
DOMAIN-ca-key.pem, which signs certificates and is to be kept.`,
		Example: `  culvert tls ca create
  culvert tls ca create --domain nomad --days 3650`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			certFile, keyFile, err := certs.CreateCA(o)
			return printCreated(cmd.OutOrStdout(), certFile, keyFile, err)
		},
	}
	create.Flags().StringVar(&o.Domain, "domain", "consul", "the `DOMAIN` that the names will be in")
	create.Flags().IntVar(&o.Days, "days", 0, "valid for `N` days (default 5 years)")

	cmd := &cobra.Command{Use: "ca", Short: "Make a CA", Example: "  culvert tls ca create"}
	cmd.AddCommand(create)
	return cmd
}

func tlsCertCommand() *cobra.Command {
	var (
		o               certs.CertOptions
		server, gateway bool
	)
	create := &cobra.Command{
		Use:   "create (--server | --gateway) --dc DC --node NODE",
		Short: "Make a certificate for a server or a gateway",
		Long: `Make a certificate for the sidecar of a server, or for a gateway, signed by the CA in
the current folder: DC-server-DOMAIN-NODE.pem and DC-server-DOMAIN-NODE-key.pem,
or DC-gateway-... . It is good for both ends of a connection.`,
		Example: `  culvert tls cert create --server --dc dc1 --node alice
  culvert tls cert create --gateway --dc dc1 --node gw1 --days 90
  culvert tls cert create --server --dc dc1 --node alice --ca ../consul-agent-ca.pem --key ../consul-agent-ca-key.pem`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case server == gateway:
				return usageError{errors.New("want one of --server and --gateway"), "see `culvert tls cert create --help`"}
			case o.Identity.Datacenter == "" || o.Identity.Node == "":
				return usageError{errors.New("want both --dc and --node"), "see `culvert tls cert create --help`"}
			case (o.CAFile == "") != (o.CAKeyFile == ""):
				return usageError{errors.New("want both --ca and --key, or neither"), "without them the CA in the current folder is used"}
			case gateway:
				o.Identity.Role = certs.RoleGateway
			default:
				o.Identity.Role = certs.RoleServer
			}
			certFile, keyFile, err := certs.CreateCert(o)
			return printCreated(cmd.OutOrStdout(), certFile, keyFile, err)
		},
	}
	flags := create.Flags()
	flags.BoolVar(&server, "server", false, "for the sidecar of a server")
	flags.BoolVar(&gateway, "gateway", false, "for a gateway")
	flags.StringVar(&o.Identity.Datacenter, "dc", "", "the `DATACENTER` it is in")
	flags.StringVar(&o.Identity.Node, "node", "", "the `NODE` name of the server, or of the gateway")
	flags.StringVar(&o.Domain, "domain", "consul", "the `DOMAIN` that the names are in")
	flags.IntVar(&o.Days, "days", 0, "valid for `N` days, at most as long as the CA (default 365)")
	flags.StringVar(&o.CAFile, "ca", "", "the CA's certificate `FILE` (default DOMAIN-ca.pem)")
	flags.StringVar(&o.CAKeyFile, "key", "", "the CA's key `FILE` (default DOMAIN-ca-key.pem)")

	cmd := &cobra.Command{
		Use: "cert", Short: "Make a certificate for a server or a gateway",
		Example: "  culvert tls cert create --server --dc dc1 --node alice",
	}
	cmd.AddCommand(create)
	return cmd
}

// printCreated says what was made, and until when it is good.
func printCreated(w io.Writer, certFile, keyFile string, err error) error {
	if err != nil {
		return err
	}
	all, err := certs.Inspect(certFile, "", "", time.Now())
	if err != nil {
		return fmt.Errorf("read what was made: %w", err)
	}
	_, err = fmt.Fprintf(w, "%s  valid until %s\n%s  keep it secret\n", certFile, all[0].NotAfter.Format(time.DateOnly), keyFile)
	return err
}

func tlsInspectCommand() *cobra.Command {
	var (
		caFile, domain string
		asJSON         bool
	)
	cmd := &cobra.Command{
		Use:   "inspect FILE",
		Short: "Tell what the certificates in a file are good for",
		Long: `Tell the names, role and identity of each certificate in a PEM file, what it may be used
for, when it expires, and whether it leads to the CA.`,
		Example: `  culvert tls inspect dc1-server-consul-alice.pem
  culvert tls inspect --ca consul-agent-ca.pem dc1-server-consul-0.pem
  culvert tls inspect --json consul-ca.pem`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			now := time.Now()
			all, err := certs.Inspect(args[0], caFile, domain, now)
			if err != nil {
				return err
			}
			if asJSON {
				e := json.NewEncoder(cmd.OutOrStdout())
				e.SetIndent("", "  ")
				return e.Encode(all)
			}
			return printFacts(cmd.OutOrStdout(), all, now)
		},
	}
	cmd.Flags().StringVar(&caFile, "ca", "", "the CA's certificate `FILE` (default DOMAIN-ca.pem beside FILE)")
	cmd.Flags().StringVar(&domain, "domain", "", "the `DOMAIN` to look for an identity in (default that of the names)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printFacts(w io.Writer, all []certs.Facts, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for i, f := range all {
		if i > 0 {
			_, _ = fmt.Fprintln(t) // Flush returns the error of every write
		}
		for _, row := range factRows(f, now) {
			_, _ = fmt.Fprintf(t, "%s\t%s\n", row[0], row[1])
		}
	}
	return t.Flush()
}

func factRows(f certs.Facts, now time.Time) [][2]string {
	rows := [][2]string{{"subject", withKeyID(f.Subject, f.KeyID)}}
	add := func(key, value string) { rows = append(rows, [2]string{key, value}) }
	if f.CA {
		add("role", "CA")
		add("used for", "issuing certificates")
	} else {
		names := "none"
		if len(f.Names) > 0 {
			names = strings.Join(f.Names, ", ")
		}
		add("names", names)
		if f.Identity != "" {
			add("identity", "none, "+f.Identity)
		} else {
			add("role", string(f.Role))
			add("identity", certs.Identity{Datacenter: f.Datacenter, Node: f.Node}.String()+" in domain "+f.Domain)
		}
		add("used for", f.Usages)
	}
	add("valid", fmt.Sprintf("%s to %s, %s", f.NotBefore.Format(time.RFC3339), f.NotAfter.Format(time.RFC3339), remaining(f, now)))
	add("issued by", withKeyID(f.Issuer, f.IssuerKeyID))
	switch {
	case f.ChainFault != "":
		add("chain", f.ChainFault)
	case len(f.Chain) > 0:
		add("chain", strings.Join(f.Chain, " <- "))
	}
	return rows
}

func withKeyID(name, id string) string {
	if id == "" {
		return name
	}
	return name + " (key id " + id + ")"
}

func remaining(f certs.Facts, now time.Time) string {
	switch {
	case now.Before(f.NotBefore):
		return "NOT YET"
	case now.After(f.NotAfter):
		return "EXPIRED"
	default:
		return fmt.Sprintf("%d days left", int(f.NotAfter.Sub(now).Hours()/24))
	}
}
