# Calls service a of every namespace from service b of every namespace; prints who reaches whom.
for from in secured lax legacy; do
  for to in secured lax legacy; do
    status=$(kubectl exec -n "$from" deploy/b -c b -- curl -s -o /dev/null -w '%{http_code}' "http://a.$to") || true
    [ "$status" = 200 ] && status=reached || status="not reached"
    echo "b.$from to a.$to: $status"
  done
done
