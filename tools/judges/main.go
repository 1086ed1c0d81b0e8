// One Kubernetes object a line comes in as JSON, one word a line goes out: what kstatus makes of it (Current, InProgress, Failed,
// Terminating, NotFound, Unknown). It stays open until its input ends, so that a test run needs one process.
package main

import (
	"bufio"
	"fmt"
	"os"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/cli-utils/pkg/kstatus/status"
)

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		object := &unstructured.Unstructured{}
		if err := object.UnmarshalJSON(lines.Bytes()); err != nil {
			stop(err)
		}
		result, err := status.Compute(object)
		if err != nil {
			stop(err)
		}
		fmt.Println(result.Status)
	}
	if err := lines.Err(); err != nil {
		stop(err)
	}
}

func stop(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}
